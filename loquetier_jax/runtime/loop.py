"""One iteration: look at the queues, decide, dispatch, and read what the iteration before left on the device."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from loquetier_jax.batch.pack import StepItems, pack_step
from loquetier_jax.batch.segments import ravel
from loquetier_jax.config import Bucket, EngineConfig, SLOConfig
from loquetier_jax.runtime.passes import OptimizerResult, RunningPass
from loquetier_jax.runtime.scoring import ScoreTask, Scoring
from loquetier_jax.runtime.serving import SampledRow, Serving
from loquetier_jax.runtime.snapshot import snapshot
from loquetier_jax.runtime.training import Training
from loquetier_jax.schedule.latency import (
    BACKWARD,
    BACKWARD_SLICE,
    FORWARD,
    FORWARD_SLICE,
    OPTIMIZER,
    LatencyModel,
    Run,
)
from loquetier_jax.schedule.policy import PolicyConfig, decide
from loquetier_jax.schedule.snapshot import Decision, Fairness, Quantum
from loquetier_jax.serve.request import Request
from loquetier_jax.step.functions import StepFunctions
from loquetier_jax.step.state import DeviceState


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
        forward, quanta: What ran, for the latency model.
        fused: Whether a training pass starts in the forward: the head of its backward follows, as a part of it.
    """

    epoch: int
    started: float
    rows: list[SampledRow] = field(default_factory=list)
    sampled: dict[str, jax.Array] = field(default_factory=dict)
    tasks: list[ScoreTask] = field(default_factory=list)
    scores: dict[str, jax.Array] = field(default_factory=dict)
    score_rows: int = 0
    done: RunningPass | None = None
    optimizers: list[OptimizerResult] = field(default_factory=list)
    tail: list[Any] = field(default_factory=list)
    forward: Run | None = None
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


@dataclass
class Loop:
    """Runs iterations. The host is at most one iteration ahead of the device.

    Attributes:
        epoch: Iterations dispatched; the epoch of the last one.
        on_iteration: Called with (decision, milliseconds) whenever an iteration has been read.
    """

    cfg: EngineConfig
    state: DeviceState
    functions: StepFunctions
    serving: Serving
    scoring: Scoring
    training: Training
    latency: LatencyModel
    policy: PolicyConfig
    slo: SLOConfig
    clock: Callable[[], float] = time.perf_counter
    epoch: int = 0
    fairness: Fairness = field(default_factory=Fairness)
    on_iteration: Callable[[Pending, float], None] | None = None
    _pending: list[Pending] = field(default_factory=list)
    _last_ready: float = 0.0

    @property
    def busy(self) -> bool:
        """Whether dispatched work has not been read."""
        return bool(self._pending)

    def is_idle(self) -> bool:
        """Whether there is nothing to do, and will be nothing before somebody asks for it."""
        return not (self.busy or self.serving.waiting or self.serving.running or self.training.trainees or self.scoring)

    def iterate(self) -> bool:
        """Dispatches one decision and reads the one before; returns whether there was anything to do."""
        self.training.tick(self.epoch)
        self.scoring.open()
        decision = decide(snapshot(self), self.latency, self.policy)
        self.fairness = decision.fairness
        admitted = [r for r in decision.admit if self._admit(self.serving.waiting[r])]
        decision = replace(decision, prefill=self._admitted_only(decision, admitted))
        sent = self._dispatch(decision)
        if self._pending and (not sent or len(self._pending) > 1):
            self.read()
            return True
        # One that could not be admitted after all is no progress: who waits for it would wait for ever.
        return sent or any(r not in self.serving.waiting for r in decision.admit)

    def forecast(self) -> Forecast:
        """When the work in flight will be done, as predicted."""
        now, late_ms = self.clock(), 0.0
        tokens = ready = self._last_ready
        for pending in self._pending:
            forward = [pending.forward] if pending.forward is not None else []
            tokens = max(ready, pending.started) + sum(self.latency.predict(*run) for run in forward) / 1e3
            ready = tokens + sum(self.latency.predict(*run) for run in pending.quanta) / 1e3
            late_ms += sum(self.latency.late(*run) for run in (*forward, *pending.quanta))
        return Forecast(max(now, tokens), max(now, ready), late_ms)

    def drain(self) -> None:
        """Reads everything dispatched."""
        while self._pending:
            self.read()

    def _admit(self, request: Request) -> bool:
        if not self.serving.admit(request, self.clock(), self.epoch):
            return False
        if request.params.level == "full":
            self.state.admit(self.functions.admit(), request.slot, request.prompt_ids, self.cfg.max_model_len)
        return True

    def _admitted_only(self, decision: Decision, admitted: list[str]) -> tuple[tuple[str, int], ...]:
        refused = set(decision.admit) - set(admitted)
        return tuple((name, count) for name, count in decision.prefill if name not in refused)

    def _dispatch(self, decision: Decision) -> bool:
        pending = Pending(self.epoch + 1, self.clock())
        self.epoch += 1  # whatever is released from here on may be in use by this iteration
        if decision.bucket is not None and (
            decision.decode or decision.prefill or decision.packs or decision.score
        ):
            self._forward(pending, decision)
        for quantum in decision.quanta:
            self._quantum(pending, quantum)
            pending.done = pending.done or self.training.close_pass()
        if pending.forward is None and not pending.quanta:
            self.epoch -= 1
            return False
        self._pending.append(pending)
        return True

    def _forward(self, pending: Pending, decision: Decision) -> None:
        """Dispatches one forward with everything that the decision puts into it."""
        bucket, running = decision.bucket, self.serving.running
        wanted = set(decision.decode)
        items = StepItems(
            prefill=[self.serving.chunk(running[name], count) for name, count in decision.prefill],
            decode=[item for name, item in self.serving.decode_items() if name in wanted],
        )
        self._run_forward(pending, bucket, items, decision.packs, decision.score)

    def _run_forward(
        self,
        pending: Pending,
        bucket: Bucket,
        items: StepItems,
        packs: tuple[str, ...],
        score: tuple[str, ...],
    ) -> None:
        started = self.training.start_pass(packs, bucket.packs) if packs else None
        if started is not None:
            items.train = started.run.items
        items.score, tasks = self.scoring.take(score)
        batch = pack_step(items, bucket, self.cfg)
        run = self.functions.forward(bucket, started is not None and started.run.key.dropout)
        out = self.state.run_forward(run, jax.device_put(ravel(batch)))
        if items.decode or items.prefill:  # a second forward of this iteration has none: leave the first one's
            pending.rows, pending.sampled = self.serving.sent(items, bucket), out.sampled
        if tasks:
            pending.tasks, pending.scores, pending.score_rows = tasks, out.score, bucket.score_tokens
        key = (FORWARD, bucket.name), bucket.rows
        if pending.forward is None:
            pending.forward, pending.fused = key, started is not None
        else:
            pending.quanta.append(key)
        if started is not None:
            started.run.take_fused(out, batch, self.functions, self.state)
            pending.tail.append(started.run.tail)

    def _quantum(self, pending: Pending, quantum: Quantum) -> None:
        """Dispatches a piece of training or scoring without inference rows."""
        training = self.training
        if quantum.kind == "forward":
            self._run_forward(pending, quantum.bucket, StepItems(), quantum.packs, quantum.score)
            return
        if quantum.kind == "optimizer":
            pending.optimizers = training.optimize(quantum.jobs, pending.epoch)
            pending.quanta += [((OPTIMIZER, name), 1) for name in quantum.jobs]
            return
        if quantum.packs:
            training.start_pass(quantum.packs, quantum.bucket.packs).run.start_slices(
                self.cfg, self.functions, self.state
            )
        run = training.current.run
        shape = run.key.bucket
        if quantum.kind == "forward_slice":
            count = min(quantum.count, len(run.forward))
            for _ in range(count):
                run.run_forward_slice(self.functions, self.state)
            pending.quanta += [((FORWARD_SLICE, shape.name), shape.rows)] * count
        else:
            slices = len(run.backward)
            whole = run.run_backward(quantum.count, self.functions, self.state)
            name = BACKWARD if whole else BACKWARD_SLICE
            ran = 1 if whole else slices - len(run.backward)
            pending.quanta += [((name, shape.name), shape.rows)] * ran
        pending.tail.append(run.tail)

    def read(self) -> None:
        """Waits for the oldest iteration and hands its results out: tokens as soon as they are there."""
        pending = self._pending.pop(0)
        tokens = self._read_tokens(pending)
        scores = {name: np.asarray(value) for name, value in pending.scores.items()}
        jax.block_until_ready((pending.tail, [o.metrics for o in pending.optimizers]))
        more = tokens is None or pending.fused or pending.quanta
        ms = self._observe(pending, tokens, self.clock() if more else tokens)
        self.scoring.accept(pending.tasks, scores, pending.score_rows)
        if pending.done is not None:
            self.training.accept_pass(pending.done)
        for result in pending.optimizers:
            self.training.accept_optimizer(result)
        self.serving.complete(pending.epoch)
        self.training.complete(pending.epoch)
        if self.on_iteration is not None:
            self.on_iteration(pending, ms)

    def _read_tokens(self, pending: Pending) -> float | None:
        """Hands out the tokens, which do not wait for what runs after the forward; when they came, None without any."""
        if not pending.rows:
            return None
        sampled = {name: np.asarray(value) for name, value in pending.sampled.items()}
        now = self.clock()
        self.serving.accept(pending.rows, sampled, now, self.epoch)
        return now

    def _observe(self, pending: Pending, tokens: float | None, ready: float) -> float:
        """Keeps the latency table true; returns the milliseconds of the whole iteration."""
        started = max(self._last_ready, pending.started)
        self._last_ready = ready
        ms = 1e3 * (ready - started)
        forward_ms = None if tokens is None or pending.fused else 1e3 * (tokens - started)
        self.latency.observe_step(pending.forward, pending.quanta, ms, forward_ms)
        return ms
