"""The policy against a clock that only predictions move: what would this lattice do with that load?

result = Simulator(buckets=cfg.buckets, latency=measured, slo=cfg.slo).run(requests, jobs)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from loquetier_jax.config import Bucket, Sampling, SLOConfig
from loquetier_jax.schedule.latency import LatencyModel
from loquetier_jax.schedule.policy import PolicyConfig, decide
from loquetier_jax.schedule.snapshot import (
    Decision,
    Decoding,
    Fairness,
    JobView,
    PassView,
    Prefilling,
    Quantum,
    ScoreView,
    SlicedShape,
    Snapshot,
    Waiting,
)


@dataclass
class SimRequest:
    """A request of known length; the simulator writes the fields after `sampling`.

    Attributes:
        id, adapter, sampling: As in Waiting.
        arrival: Seconds.
        prompt, output: Tokens.
        remaining: Prompt tokens not run yet; None while it waits.
        times: When each output token came.
    """

    id: str
    arrival: float
    prompt: int
    output: int
    adapter: str = ""
    sampling: Sampling = "greedy"
    remaining: int | None = None
    times: list[float] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return len(self.times) >= self.output

    @property
    def ttft_ms(self) -> float:
        return 1e3 * (self.times[0] - self.arrival)

    @property
    def tpot_ms(self) -> float:
        """Mean gap; 0 for a single token."""
        return 1e3 * (self.times[-1] - self.times[0]) / max(len(self.times) - 1, 1)


@dataclass
class SimJob:
    """A job that always has data: `accumulate` packs, then an optimizer step; the rest is written here."""

    name: str
    pack_tokens: int
    accumulate: int = 1
    group: str = ""
    packs: int = 0
    steps: int = 0
    pending: int = 0
    in_pass: bool = False

    def view(self) -> JobView:
        """What the policy sees."""
        due = self.pending == self.accumulate
        status = "in_pass" if self.in_pass else "optimizer" if due else "ready"
        left = self.accumulate - self.pending
        return JobView(name=self.name, status=status, pack_tokens=self.pack_tokens, packs=left, group=self.group)


@dataclass(kw_only=True)
class Simulator:
    """One engine without a device.

    Attributes:
        buckets, slo, sliced, slices: As in Snapshot.
        latency: What takes how long, and what the policy predicts.
        config: Of the policy.
        slots, pages, page_size: Room for requests.
        observe: Called with every snapshot and its decision.
        before_quantum: Called with the queues as they are before every quantum.
        now: The clock, seconds.
        scored: Ids of scored packs, in order.
    """

    buckets: tuple[Bucket, ...]
    latency: LatencyModel
    slo: SLOConfig = field(default_factory=SLOConfig)
    config: PolicyConfig = field(default_factory=PolicyConfig)
    sliced: tuple[SlicedShape, ...] = ()
    slices: int = 1
    slots: int = 16
    pages: int = 1024
    page_size: int = 16
    observe: Callable[[Snapshot, Decision], None] = lambda snapshot, decision: None
    before_quantum: Callable[[Snapshot, Quantum], None] = lambda snapshot, quantum: None
    now: float = 0.0
    scored: list[str] = field(default_factory=list)
    _pass: PassView | None = None
    _fairness: Fairness = field(default_factory=Fairness)

    def run(
        self,
        requests: Sequence[SimRequest],
        jobs: Sequence[SimJob] = (),
        score: Sequence[ScoreView] = (),
        until: float | None = None,
    ) -> None:
        """Runs to `until`, or else until all requests and scores are done; fills in `requests`."""
        score = list(score)
        requests = sorted(requests, key=lambda r: r.arrival)
        while any(not r.finished for r in requests) or score or until is not None:
            if until is not None and self.now >= until:
                return
            snapshot = self.snapshot(requests, jobs, score)
            decision = decide(snapshot, self.latency, self.config)
            self.observe(snapshot, decision)
            self._fairness = decision.fairness
            if decision.idle:
                later = [r.arrival for r in requests if r.arrival > self.now]
                if not later:
                    return
                self.now = min(later)
                continue
            self._apply(decision, {r.id: r for r in requests}, {j.name: j for j in jobs}, score)

    def snapshot(self, requests: Sequence[SimRequest], jobs: Sequence[SimJob], score: Sequence[ScoreView]) -> Snapshot:
        """The queues as they are now."""
        here = [r for r in requests if r.arrival <= self.now and not r.finished]
        admitted = [r for r in here if r.remaining is not None]
        return Snapshot(
            now=self.now,
            buckets=self.buckets,
            running=tuple(
                Decoding(
                    id=r.id,
                    sampling=r.sampling,
                    first_token_time=r.times[0],
                    last_token_time=r.times[-1],
                    num_output=len(r.times),
                    remaining=r.output - len(r.times),
                    pages=self._waiting(r).pages,
                )
                for r in admitted
                if r.remaining == 0
            ),
            prefilling=tuple(
                Prefilling(id=r.id, adapter=r.adapter, sampling=r.sampling, arrival=r.arrival, remaining=r.remaining)
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

    def _waiting(self, r: SimRequest) -> Waiting:
        return Waiting(
            id=r.id,
            adapter=r.adapter,
            sampling=r.sampling,
            arrival=r.arrival,
            prompt_tokens=r.prompt,
            pages=-(-(r.prompt + r.output) // self.page_size),
        )

    def _apply(
        self,
        decision: Decision,
        requests: dict[str, SimRequest],
        jobs: dict[str, SimJob],
        score: list[ScoreView],
    ) -> None:
        for name in decision.admit:
            requests[name].remaining = requests[name].prompt
        self.now += decision.forward_ms / 1e3
        for name, tokens in decision.prefill:
            requests[name].remaining -= tokens
        ended = [name for name, _ in decision.prefill if not requests[name].remaining]
        for name in (*decision.decode, *ended):
            requests[name].times.append(self.now)
        self._score(decision.score, score)
        if decision.packs:
            self._start(decision.packs, decision.bucket, jobs, "backward", self.slices)
        for quantum in decision.quanta:
            self.before_quantum(self.snapshot([*requests.values()], [*jobs.values()], score), quantum)
            self.now += quantum.ms / 1e3
            self._quantum(quantum, jobs, score)

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
