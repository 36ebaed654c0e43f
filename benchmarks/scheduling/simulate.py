"""The policy against a clock that only a table moves: what would these buckets do with that load?

Simulator(buckets=cfg.buckets, latency=measured, slo=cfg.slo).run(requests, jobs)

As in the engine, the host is a step ahead of the device: a decision is made while the step before it runs, whose end
is only predicted, and the times of a step are seen once it has been read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.scheduling.simulated import SimJob, SimRequest
from loquetier_jax.config import Bucket, SLOConfig
from loquetier_jax.schedule.latency import (
    BACKWARD,
    BACKWARD_SLICE,
    FORWARD,
    FORWARD_SLICE,
    OPTIMIZER,
    LatencyModel,
    Reads,
    Run,
    chunk_pairs,
)
from loquetier_jax.schedule.policy import PolicyConfig, decide
from loquetier_jax.schedule.types import (
    Decision,
    Decoding,
    Fairness,
    PassView,
    Prefilling,
    Quantum,
    ScoreView,
    SlicedShape,
    Snapshot,
    Waiting,
)


@dataclass
class Flight:
    """A step that has been dispatched.

    Attributes:
        forward, quanta: What runs.
        started, tokens, ready: When it begins, has its tokens and is done, seconds; nobody knows before it is read.
    """

    forward: list[Run]
    started: float
    tokens: float
    ready: float = 0.0
    quanta: list[Run] = field(default_factory=list)


@dataclass(kw_only=True)
class Simulator:
    """One engine without a device.

    Attributes:
        buckets, slo, sliced, slices: As in Snapshot.
        latency: What the policy predicts; it observes what steps took.
        truth: What things take on average; None: just what is predicted.
        noise: Called once a step: by which factor it takes longer than that.
        config: Of the policy.
        slots, pages, page_size: Room for requests.
        observe: Called with every snapshot and its decision.
        before_quantum: Called with the queues as they are before every quantum, if given.
        now: The clock of the host, seconds.
        scored: Ids of scored packs, in order.
    """

    buckets: tuple[Bucket, ...]
    latency: LatencyModel
    truth: LatencyModel | None = None
    noise: Callable[[], float] = lambda: 1.0
    slo: SLOConfig = field(default_factory=SLOConfig)
    config: PolicyConfig = field(default_factory=PolicyConfig)
    sliced: tuple[SlicedShape, ...] = ()
    slices: int = 1
    slots: int = 16
    pages: int = 1024
    page_size: int = 16
    observe: Callable[[Snapshot, Decision], None] = lambda snapshot, decision: None
    before_quantum: Callable[[Snapshot, Quantum], None] | None = None
    now: float = 0.0
    scored: list[str] = field(default_factory=list)
    _pass: PassView | None = None
    _fairness: Fairness = field(default_factory=Fairness)
    _flying: list[Flight] = field(default_factory=list)

    def run(
        self,
        requests: Sequence[SimRequest],
        jobs: Sequence[SimJob] = (),
        score: Sequence[ScoreView] = (),
        until: float | None = None,
    ) -> None:
        """Runs to `until`, or else until all requests and scores are done; fills in `requests` and `jobs`."""
        score = list(score)
        requests = sorted(requests, key=lambda r: r.arrival)
        while any(not r.finished for r in requests) or score or until is not None:
            if until is not None and self.now >= until:
                return
            snapshot = self.snapshot(requests, jobs, score)
            decision = decide(snapshot, self.latency, self.config)
            self.observe(snapshot, decision)
            self._fairness = decision.fairness
            if not decision.idle:
                self._dispatch(decision, {r.id: r for r in requests}, {j.name: j for j in jobs}, score)
            if self._flying and (decision.idle or len(self._flying) > 1):
                self._read()
            elif decision.idle:
                later = [r.arrival for r in requests if r.arrival > self.now]
                if not later:
                    return
                self.now = min(later)

    def snapshot(self, requests: Sequence[SimRequest], jobs: Sequence[SimJob], score: Sequence[ScoreView]) -> Snapshot:
        """The queues as the host sees them now."""
        here = [r for r in requests if r.arrival <= self.now and not r.finished]
        admitted = [r for r in here if r.remaining is not None]
        tokens, ready, late_ms = self._forecast()
        return Snapshot(
            now=ready,
            late_ms=late_ms,
            buckets=self.buckets,
            running=tuple(self._decoding(r, tokens) for r in admitted if r.remaining == 0),
            prefilling=tuple(
                Prefilling(
                    id=r.id, adapter=r.adapter, arrival=r.arrival, remaining=r.remaining, done=r.prompt - r.remaining
                )
                for r in admitted
                if r.remaining
            ),
            waiting=tuple(self._waiting(r) for r in here if r.remaining is None),
            free_slots=self.slots - len(admitted),
            free_pages=self.pages - sum(self._waiting(r).pages for r in admitted),
            jobs=tuple(j.view() for j in jobs),
            train_pass=self._pass,
            sliced=self.sliced,
            slices=self.slices,
            score=tuple(score),
            slo=self.slo,
            fairness=self._fairness,
        )

    def _forecast(self) -> tuple[float, float, float]:
        """(when the last tokens come, when the device is free, by how many ms later), of what is in flight."""
        tokens, ready, late_ms = self.now, self.now, 0.0
        for flight in self._flying:
            tokens = ready + sum(self.latency.predict(*run) for run in flight.forward) / 1e3
            ready = tokens + sum(self.latency.predict(*run) for run in flight.quanta) / 1e3
            late_ms += sum(self.latency.late(*run) for run in (*flight.forward, *flight.quanta))
        return tokens, ready, late_ms

    def _decoding(self, r: SimRequest, expected: float) -> Decoding:
        """What is known of a request: a token in flight is `expected`, not drawn."""
        return Decoding(
            id=r.id,
            first_token_time=r.times[0] if r.times[0] <= self.now else expected,
            last_token_time=r.times[-1] if r.times[-1] <= self.now else expected,
            num_output=len(r.times),
            remaining=r.output - len(r.times),
            pages=self._waiting(r).pages,
            context=r.prompt + len(r.times),
        )

    def _waiting(self, r: SimRequest) -> Waiting:
        return Waiting(
            id=r.id,
            adapter=r.adapter,
            arrival=r.arrival,
            prompt_tokens=r.prompt,
            pages=-(-(r.prompt + r.output) // self.page_size),
        )

    def _dispatch(
        self,
        decision: Decision,
        requests: dict[str, SimRequest],
        jobs: dict[str, SimJob],
        score: list[ScoreView],
    ) -> None:
        for name in decision.admit:
            requests[name].remaining = requests[name].prompt
        reads = self._reads(decision, requests)
        factor, truth = self.noise(), self.truth or self.latency
        started = max([self.now, *(f.ready for f in self._flying)])
        bucket = decision.bucket
        forward = [Run((FORWARD, bucket.name), bucket.rows, reads)] if bucket else []
        flight = Flight(forward, started, started + factor * sum(truth.predict(*run) for run in forward) / 1e3)
        for name, tokens in decision.prefill:
            requests[name].remaining -= tokens
        ended = [name for name, _ in decision.prefill if not requests[name].remaining]
        for name in (*decision.decode, *ended):
            requests[name].times.append(flight.tokens)
        self._score(decision.score, score)
        if decision.packs:
            self._start(decision.packs, bucket, jobs, "backward", self.slices)
        for quantum in decision.quanta:
            if self.before_quantum is not None:
                self.before_quantum(self.snapshot([*requests.values()], [*jobs.values()], score), quantum)
            flight.quanta += self._runs(quantum)
            self._quantum(quantum, jobs, score)
        flight.ready = flight.tokens + factor * sum(truth.predict(*run) for run in flight.quanta) / 1e3
        self._flying.append(flight)

    def _reads(self, decision: Decision, requests: dict[str, SimRequest]) -> Reads:
        """What the inference rows of a decision read."""
        decode = [requests[name] for name in decision.decode]
        chunks = [(requests[name], tokens) for name, tokens in decision.prefill]
        return Reads(
            kv_tokens=sum(r.prompt + len(r.times) for r in decode),
            pairs=sum(chunk_pairs(r.prompt - r.remaining, tokens) for r, tokens in chunks),
        )

    def _read(self) -> None:
        """Waits for the oldest step and learns what it took."""
        flight = self._flying.pop(0)
        self.now = max(self.now, flight.ready)
        if self.truth is not None:
            ms, forward_ms = 1e3 * (flight.ready - flight.started), 1e3 * (flight.tokens - flight.started)
            self.latency.observe_step(flight.forward, flight.quanta, ms, forward_ms)

    def _runs(self, quantum: Quantum) -> list[Run]:
        """The compiled calls of a quantum, before it runs."""
        if quantum.kind == "optimizer":
            return [Run((OPTIMIZER, name), 1) for name in quantum.jobs]
        shape = quantum.bucket or Bucket(packs=self._pass.packs, pack_tokens=self._pass.pack_tokens)
        if quantum.kind == "forward":
            return [Run((FORWARD, shape.name), shape.rows)]
        if quantum.kind == "forward_slice":
            return [Run((FORWARD_SLICE, shape.name), shape.rows)] * quantum.count
        if quantum.count == self.slices:
            return [Run((BACKWARD, shape.name), shape.rows)]
        return [Run((BACKWARD_SLICE, shape.name), shape.rows)] * quantum.count

    def _quantum(self, quantum: Quantum, jobs: dict[str, SimJob], score: list[ScoreView]) -> None:
        if quantum.kind == "optimizer":
            for name in quantum.jobs:
                jobs[name].steps += 1
                jobs[name].pending = 0
            return
        if quantum.kind == "forward":
            self._score(quantum.score, score)
            if quantum.packs:
                self._start(quantum.packs, quantum.bucket, jobs, "backward", self.slices)
            return
        if quantum.packs:
            shape = next(
                s for s in self.sliced if (s.packs, s.pack_tokens) == (quantum.bucket.packs, quantum.bucket.pack_tokens)
            )
            self._start(quantum.packs, quantum.bucket, jobs, "forward", shape.slices)
        self._advance(quantum.count, jobs)

    def _start(self, packs: Sequence[str], shape: Bucket, jobs: dict[str, SimJob], stage: str, slices: int) -> None:
        for name in packs:
            jobs[name].packs += 1
            jobs[name].pending += 1
            jobs[name].in_pass = True
        self._pass = PassView(
            packs=shape.packs, pack_tokens=shape.pack_tokens, stage=stage, slices=slices, slices_left=slices
        )

    def _advance(self, count: int, jobs: dict[str, SimJob]) -> None:
        view = self._pass
        left, stage, slices = view.slices_left - count, view.stage, view.slices
        if left == 0 and stage == "forward":
            left, stage, slices = self.slices, "backward", self.slices
        self._pass = PassView(
            packs=view.packs, pack_tokens=view.pack_tokens, stage=stage, slices=slices, slices_left=left
        )
        if left == 0:
            self._pass = None
            for job in jobs.values():
                job.in_pass = False

    def _score(self, ids: Sequence[str], score: list[ScoreView]) -> None:
        for name in ids:
            i = next(i for i, view in enumerate(score) if view.id == name)
            view = score.pop(i)
            if view.packs > 1:
                score.insert(i, ScoreView(id=view.id, tokens=view.tokens, packs=view.packs - 1))
            self.scored.append(name)
