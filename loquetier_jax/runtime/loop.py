"""The engine loop: each iteration inspects the queues, decides, dispatches, and reads the previous iteration."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import jax
import numpy as np

from loquetier_jax.batch.pack import PackedStep, StepItems, pack_step
from loquetier_jax.batch.rows import ravel
from loquetier_jax.config import Bucket, EngineConfig, SLOConfig
from loquetier_jax.fair_lock import FairLock
from loquetier_jax.runtime.pending import Forecast, Pending
from loquetier_jax.runtime.reads import reads_of
from loquetier_jax.sampling_params import level_of
from loquetier_jax.schedule.latency import (
    BACKWARD,
    BACKWARD_SLICE,
    FORWARD,
    FORWARD_SLICE,
    OPTIMIZER,
    LatencyModel,
    Run,
    sampler_run,
)
from loquetier_jax.schedule.policy import PolicyConfig, decide
from loquetier_jax.schedule.types import Decision, Fairness, Quantum, SamplerTime, SlicedShape, Snapshot
from loquetier_jax.serve.queue import RequestQueue
from loquetier_jax.serve.request import Request
from loquetier_jax.serve.scoring import Scoring
from loquetier_jax.step.compiled import StepFunctions
from loquetier_jax.step.state import DeviceState
from loquetier_jax.step.unified import ForwardOut
from loquetier_jax.train.runner import JobRunner


@dataclass
class Loop:
    """Runs iterations. The host is at most one iteration ahead of the device.

    Called by one thread at a time. `lock` is held while queues, jobs and pages are read or changed, but not while
    waiting for the device, when other threads may take it.

    Attributes:
        epoch: Number of iterations dispatched, i.e. the epoch of the last one.
        on_iteration: Called with (pending, milliseconds) after an iteration has been read.
    """

    cfg: EngineConfig
    state: DeviceState
    functions: StepFunctions
    serving: RequestQueue
    scoring: Scoring
    training: JobRunner
    latency: LatencyModel
    policy: PolicyConfig
    slo: SLOConfig
    clock: Callable[[], float] = time.perf_counter
    lock: FairLock = field(default_factory=FairLock)
    epoch: int = 0
    fairness: Fairness = field(default_factory=Fairness)
    on_iteration: Callable[[Pending, float], None] | None = None
    _pending: list[Pending] = field(default_factory=list)
    _last_ready: float = 0.0

    @property
    def busy(self) -> bool:
        """Whether any dispatched work has not been read."""
        return bool(self._pending)

    def is_idle(self) -> bool:
        """Whether there is no work until the next command."""
        serving, training = self.serving, self.training
        return not (self.busy or serving.waiting or serving.running or training.device_jobs or self.scoring)

    def iterate(self) -> bool:
        """Dispatches one decision and reads the previous one; returns whether there was any work."""
        with self.lock:
            sent, progress = self._next()
        if self._pending and (not sent or len(self._pending) > 1):
            self.read()
            return True
        return progress

    def _next(self) -> tuple[bool, bool]:
        """Decides and dispatches; returns (whether anything was dispatched, whether there was any progress)."""
        self.training.tick(self.epoch)
        self.scoring.open()
        decision = decide(self.snapshot(), self.latency, self.policy)
        self.fairness = decision.fairness
        refused = [r for r in decision.admit if not self._admit(self.serving.waiting[r])]
        prefill = tuple((name, count) for name, count in decision.prefill if name not in refused)
        decision = replace(decision, prefill=prefill)
        sent = self._dispatch(decision)
        # A failed admission is not progress, or a caller waiting for that request would wait forever.
        return sent, sent or any(r not in self.serving.waiting for r in decision.admit)

    def snapshot(self) -> Snapshot:
        """The scheduler's input, as of now."""
        training, cfg, forecast = self.training, self.cfg, self.forecast()
        train_buckets = training.buckets()
        slices = len(self.functions.slices(cfg.slice_layers))
        sliced = [b for b in train_buckets if cfg.slice_layers and b.rows == b.train_rows]
        return Snapshot(
            now=forecast.ready,
            late_ms=forecast.late_ms,
            buckets=(*(b for b in cfg.buckets if not b.packs), *train_buckets),
            samplers=self._sampler_times(),
            **self.serving.views(forecast.tokens),
            jobs=training.views(),
            train_pass=training.pass_view(),
            sliced=tuple(SlicedShape(packs=b.packs, pack_tokens=b.pack_tokens, slices=slices) for b in sliced),
            slices=slices,
            score=self.scoring.views(),
            slo=self.slo,
            fairness=self.fairness,
        )

    def _sampler_times(self) -> tuple[SamplerTime, ...]:
        """Sampler times at the level of all running requests: an overestimate for steps that need less."""
        level = level_of(r.params.level for r in self.serving.running.values())
        predict, late = self.latency.predict, self.latency.late
        runs = (sampler_run(rows, level) for rows in self.cfg.sample_sizes)
        return tuple(SamplerTime(rows=run[1], ms=predict(*run), late=late(*run)) for run in runs)

    def forecast(self) -> Forecast:
        """Predicts when the work in flight will be done."""
        now, late_ms = self.clock(), 0.0
        tokens = ready = self._last_ready
        for pending in self._pending:
            tokens = max(ready, pending.started) + sum(self.latency.predict(*run) for run in pending.forward) / 1e3
            ready = tokens + sum(self.latency.predict(*run) for run in pending.quanta) / 1e3
            late_ms += sum(self.latency.late(*run) for run in (*pending.forward, *pending.quanta))
        return Forecast(max(now, tokens), max(now, ready), late_ms)

    def drain(self) -> None:
        """Reads the results of everything dispatched."""
        while self._pending:
            self.read()

    def _admit(self, request: Request) -> bool:
        if not self.serving.admit(request, self.clock(), self.epoch):
            return False
        if request.params.level == "full":
            self.state.admit(self.functions.admit(), request.slot, request.prompt_ids, self.cfg.max_model_len)
        return True

    def _dispatch(self, decision: Decision) -> bool:
        pending = Pending(self.epoch + 1, self.clock())
        self.epoch += 1  # this iteration may use anything released from here on
        if decision.bucket is not None and (
            decision.decode or decision.prefill or decision.packs or decision.score
        ):
            items = self.serving.items(set(decision.decode), decision.prefill)
            self._forward(pending, decision.bucket, items, decision.packs, decision.score)
        for quantum in decision.quanta:
            self._quantum(pending, quantum)
            pending.done = pending.done or self.training.close_pass()
        if not pending.forward and not pending.quanta:
            self.epoch -= 1
            return False
        self._pending.append(pending)
        return True

    def _forward(
        self,
        pending: Pending,
        bucket: Bucket,
        items: StepItems[Request],
        packs: tuple[str, ...],
        score: tuple[str, ...],
    ) -> None:
        """Dispatches one forward: inference rows, the next packs of jobs, packs to score."""
        started = self.training.start_pass(packs, bucket.packs) if packs else None
        if started is not None:
            items.train = started.run.items
        items.score, tasks = self.scoring.take(score)
        step = pack_step(items, bucket, self.cfg)
        run = self.functions.forward(bucket, started is not None and started.run.key.dropout)
        out = self.state.run_forward(run, jax.device_put(ravel(step.batch)))
        runs = [Run((FORWARD, bucket.name), bucket.rows, reads_of(items))]
        if items.decode or items.prefill:  # only the first forward of an iteration has inference rows
            runs += self._sample(pending, step, out)
            self.serving.sent(items, step.owners)
        if tasks:
            pending.tasks, pending.scores, pending.score_rows = tasks, out.score, bucket.score_tokens
        if not pending.forward:
            pending.forward, pending.fused = runs, started is not None
        else:
            pending.quanta += runs
        if started is not None:
            started.run.take_fused(out, step.batch, self.functions, self.state)
            pending.tail.append(started.run.tail)

    def _sample(self, pending: Pending, step: PackedStep[Request], out: ForwardOut) -> list[Run]:
        """Dispatches the cheapest sampler that supports the step's requests; none if all prompts continue."""
        if step.sample is None:
            pending.tail.append(out.sample_hidden)
            return []
        level = level_of(request.params.level for _, request in step.owners)
        sampler = self.functions.sampler(len(out.sample_hidden), level)
        pending.sampled = self.state.sample(sampler, out.sample_hidden, jax.device_put(ravel(step.sample)))
        for value in pending.sampled.values():
            value.copy_to_host_async()  # as soon as it is there, not when it is read
        pending.rows = step.owners
        return [sampler_run(len(out.sample_hidden), level)]

    def _quantum(self, pending: Pending, quantum: Quantum) -> None:
        """Dispatches one quantum: a piece of training or scoring without inference rows."""
        training = self.training
        if quantum.kind == "forward":
            self._forward(pending, quantum.bucket, StepItems(), quantum.packs, quantum.score)
            return
        if quantum.kind == "optimizer":
            pending.optimizers = training.optimize(quantum.jobs, pending.epoch)
            pending.quanta += [Run((OPTIMIZER, name), 1) for name in quantum.jobs]
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
            pending.quanta += [Run((FORWARD_SLICE, shape.name), shape.rows)] * count
        else:
            slices = len(run.backward)
            whole = run.run_backward(quantum.count, self.functions, self.state)
            name = BACKWARD if whole else BACKWARD_SLICE
            ran = 1 if whole else slices - len(run.backward)
            pending.quanta += [Run((name, shape.name), shape.rows)] * ran
        pending.tail.append(run.tail)

    def read(self) -> None:
        """Waits for the oldest iteration and delivers its results, tokens as soon as they are available."""
        pending = self._pending[0]
        tokens = self._read_tokens(pending)
        scores = {name: np.asarray(value) for name, value in pending.scores.items()}
        jax.block_until_ready((pending.tail, [o.metrics for o in pending.optimizers]))
        more = tokens is None or pending.fused or pending.quanta
        with self.lock:
            self._pending.pop(0)
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
        """Delivers tokens before the quanta after the forward finish; returns when they were read, None without any."""
        if not pending.rows:
            return None
        sampled = {name: np.asarray(value) for name, value in pending.sampled.items()}
        now = self.clock()
        with self.lock:
            self.serving.accept(pending.rows, sampled, now, self.epoch)
        return now

    def fail(self, message: str) -> None:
        """Ends every request and job with an error: the engine has failed. The caller holds the lock."""
        self.serving.fail_all(message, self.clock())
        for device_job in self.training.device_jobs.values():
            if not device_job.job.finished:
                device_job.job.fail(message)

    def _observe(self, pending: Pending, tokens: float | None, ready: float) -> float:
        """Updates the latency model; returns the milliseconds of the whole iteration."""
        started = max(self._last_ready, pending.started)
        self._last_ready = ready
        ms = 1e3 * (ready - started)
        forward_ms = None if tokens is None or pending.fused else 1e3 * (tokens - started)
        self.latency.observe_step(pending.forward, pending.quanta, ms, forward_ms)
        return ms
