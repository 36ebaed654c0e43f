"""What has been dispatched and not been read."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

from loquetier_jax.schedule.latency import Run
from loquetier_jax.serve.queue import SampledRows
from loquetier_jax.serve.scoring import ScoreTask
from loquetier_jax.train.micro_step import OptimizerResult, RunningPass


@dataclass
class Pending:
    """What an iteration dispatched and nobody has read yet.

    Attributes:
        epoch: Number of the iteration.
        started: When its first dispatch began, seconds.
        rows, sampled: Tokens and whose they are.
        tasks, scores, score_rows: Score rows and whose they are.
        done: A training pass whose last gradient is among the dispatched.
        optimizers: Optimizer steps.
        tail: More arrays whose readiness means that the iteration has completed.
        forward, quanta: What ran, for the latency model; `forward` is the first one, and the sampler behind it.
        fused: Whether a training pass starts in the forward: the head of its backward follows, as a part of it.
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
    """What is predicted of the work in flight; now, where there is none.

    Attributes:
        tokens, ready: When its last tokens come, and when all of it is done: seconds.
        late_ms: By how much later that is once in a hundred times.
    """

    tokens: float
    ready: float
    late_ms: float
