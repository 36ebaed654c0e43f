"""Work that has been dispatched but not read."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

from loquetier_jax.schedule.latency import Run
from loquetier_jax.serve.queue import SampledRows
from loquetier_jax.serve.scoring import ScoreTask
from loquetier_jax.train.micro_step import OptimizerResult, RunningPass


@dataclass
class Pending:
    """One dispatched iteration whose results have not been read.

    Attributes:
        epoch: Number of the iteration.
        started: When its first dispatch began, in seconds.
        rows, sampled: Sampled tokens, and the request of each row.
        tasks, scores, score_rows: Scores, their tasks, and the rows of a score pack.
        done: A micro-step whose last gradient is in this iteration.
        optimizers: Optimizer steps.
        tail: Other arrays that must be ready for the iteration to be complete.
        forward, quanta: What ran, for the latency model; `forward` is the first forward and its sampler.
        fused: Whether the forward has train rows, in which case the start of their backward is timed as part of it.
    """

    epoch: int
    started: float
    rows: SampledRows = field(default_factory=list)
    sampled: dict[str, jax.Array] = field(default_factory=dict)
    tasks: list[ScoreTask] = field(default_factory=list)
    scores: dict[str, jax.Array] = field(default_factory=dict)
    score_rows: int = 0
    done: RunningPass | None = None
    optimizers: list[OptimizerResult] = field(default_factory=list)
    tail: list[Any] = field(default_factory=list)
    forward: list[Run] = field(default_factory=list)
    quanta: list[Run] = field(default_factory=list)
    fused: bool = False


class Forecast(NamedTuple):
    """Prediction for the work in flight; the current time if there is none.

    Attributes:
        tokens, ready: When its last tokens arrive and when all of it is done, in seconds.
        late_ms: By how much the actual time exceeds `ready` once in a hundred iterations.
    """

    tokens: float
    ready: float
    late_ms: float
