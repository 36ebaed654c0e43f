"""Properties of whole runs on a simulated clock, whatever the load."""

import copy
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks.scheduling import trace
from benchmarks.scheduling.simulate import Simulator
from benchmarks.scheduling.simulated import SimJob, SimRequest
from loquetier_jax.config import BLOCK, Bucket, SLOConfig
from loquetier_jax.schedule.latency import FORWARD, LatencyModel
from loquetier_jax.schedule.policy import PolicyConfig, decide
from loquetier_jax.schedule.types import Decision, Quantum, ScoreView, SlicedShape, Snapshot

quick = settings(deadline=None, max_examples=25)
slower = settings(deadline=None, max_examples=8)

REQUESTS = st.lists(
    st.builds(
        SimRequest,
        id=st.just(""),
        arrival=st.floats(0, 0.3),
        prompt=st.integers(1, 400),
        output=st.integers(1, 20),
        adapter=st.sampled_from(["", "a", "b"]),
    ),
    min_size=1,
    max_size=24,
)
JOBS = st.lists(st.builds(SimJob, name=st.just(""), pack_tokens=st.sampled_from([256, 512]),
                          accumulate=st.integers(1, 4), group=st.sampled_from(["", "dpo"])), max_size=4)  # fmt: skip
SCORES = st.lists(st.builds(ScoreView, id=st.just("s"), tokens=st.sampled_from([64, 256, 512]),
                            packs=st.integers(1, 3)), max_size=2)  # fmt: skip
SLOS = st.sampled_from([SLOConfig(), SLOConfig(tpot_ms=30.0), SLOConfig(ttft_ms=200.0, tpot_ms=9.0)])


def named(items: list) -> list:
    for i, item in enumerate(items):
        setattr(item, "id" if hasattr(item, "id") else "name", f"{i}")
    return items


def check(snapshot: Snapshot, decision: Decision) -> None:
    """The decision is possible: every row has its place in a listed bucket, every admission has room."""
    waiting = {w.id: w for w in snapshot.waiting}
    admitted = [waiting[i] for i in decision.admit]
    assert len(admitted) <= snapshot.free_slots and sum(w.pages for w in admitted) <= snapshot.free_pages
    left = {p.id: p.remaining for p in snapshot.prefilling} | {w.id: w.prompt_tokens for w in admitted}
    chunks = dict(decision.prefill)
    assert len(chunks) == len(decision.prefill) and set(decision.admit) <= set(chunks)
    assert all(0 < tokens <= left[i] for i, tokens in chunks.items())
    assert all(tokens == left[i] or tokens % BLOCK == 0 for i, tokens in chunks.items())
    assert decision.decode == tuple(r.id for r in snapshot.running)  # the lattice has mixed buckets for all
    assert (decision.bucket is None) == (not decision.decode and not chunks)
    if decision.bucket is not None:
        packs = {j.pack_tokens for j in snapshot.jobs if j.name in decision.packs}
        need = Bucket(
            packs=len(decision.packs), pack_tokens=packs.pop() if packs else 0,
            score_packs=len(decision.score), score_tokens=64 if decision.score else 0,
            prefill=sum(-(-t // BLOCK) * BLOCK for t in chunks.values()), chunks=len(chunks),
            decode=len(decision.decode),
        )  # fmt: skip
        assert not packs and decision.bucket in snapshot.buckets and decision.bucket.covers(need)
    status = {j.name: j for j in snapshot.jobs}
    first = decision.quanta[0] if decision.quanta else None
    started = decision.packs or (first.packs if first else ())
    assert not (started and snapshot.train_pass)
    assert all(status[n].status == "ready" and started.count(n) <= status[n].packs for n in started)
    assert len({(status[n].pack_tokens, status[n].group) for n in started}) <= 1


def check_quantum(snapshot: Snapshot, quantum: Quantum) -> None:
    """Only compiled shapes, only what is next; `snapshot` is taken just before it."""
    view = snapshot.train_pass
    status = {j.name: j for j in snapshot.jobs}
    assert not (quantum.packs and view)
    if quantum.kind == "forward":
        assert quantum.bucket in snapshot.buckets and bool(quantum.packs) != bool(quantum.score)
        assert len(quantum.packs) <= quantum.bucket.packs and len(quantum.score) <= quantum.bucket.score_packs
    elif quantum.kind == "optimizer":
        assert all(status[n].status == "optimizer" for n in quantum.jobs)
    elif quantum.packs:
        shapes = {(s.packs, s.pack_tokens): s.slices for s in snapshot.sliced}
        assert quantum.count <= shapes[quantum.bucket.packs, quantum.bucket.pack_tokens]
    else:
        assert view.stage == quantum.kind.removesuffix("_slice")
        assert 1 <= quantum.count <= view.slices_left


@pytest.fixture(scope="session")
def engine(buckets: tuple[Bucket, ...], latency: LatencyModel, sliced: tuple[SlicedShape, ...]) -> Simulator:
    return Simulator(
        buckets=buckets,
        latency=latency,
        sliced=sliced,
        slices=4,
        slots=12,
        pages=80,
        observe=check,
        before_quantum=check_quantum,
    )


@quick
@given(requests=REQUESTS, jobs=JOBS, score=SCORES, slo=SLOS)
def test_every_request_finishes_and_every_decision_fits(
    engine: Simulator, requests: list[SimRequest], jobs: list[SimJob], score: list[ScoreView], slo: SLOConfig
) -> None:
    run = copy.deepcopy(engine)
    run.slo = slo
    run.run(named(requests), named(jobs), score)
    assert all(r.finished and len(r.times) == r.output for r in requests)
    assert len(run.scored) == sum(s.packs for s in score)
    for r in requests:
        assert r.times == sorted(r.times) and r.times[0] > r.arrival


@quick
@given(jobs=JOBS.filter(bool), requests=REQUESTS, lead=st.integers(1, 3))
def test_jobs_stay_within_a_pack_of_each_other(
    engine: Simulator, jobs: list[SimJob], requests: list[SimRequest], lead: int
) -> None:
    run = copy.deepcopy(engine)
    run.config = PolicyConfig(max_lead=lead)

    def observe(snapshot: Snapshot, decision: Decision) -> None:
        packs = [job.packs for job in jobs]
        assert max(packs) - min(packs) <= lead

    run.observe = observe
    run.run(named(requests), named(jobs), until=1.5)
    assert min(job.packs for job in jobs) > 5 and all(job.steps == job.packs // job.accumulate or
        job.packs - job.steps * job.accumulate <= job.accumulate for job in jobs)  # fmt: skip


@slower
@given(quiet=st.lists(st.floats(0, 1.5), min_size=1, max_size=5), loud=st.integers(50, 150))
def test_a_quiet_adapter_is_not_starved_by_a_loud_one(engine: Simulator, quiet: list[float], loud: int) -> None:
    run = copy.deepcopy(engine)
    flood = [SimRequest(f"f{i}", 0.0, 200, 8, "loud") for i in range(loud)]
    few = [SimRequest(f"q{i}", at, 30, 4, "quiet") for i, at in enumerate(quiet)]
    run.run([*flood, *few])
    # In a slot freed by one request of the flood (8 steps of at most 10.4 ms), then one chunk.
    assert all(r.ttft_ms < 250 for r in few)


@slower
@given(order=st.text("ab", min_size=30, max_size=60))
def test_a_large_request_among_small_ones_gets_in(engine: Simulator, order: str) -> None:
    run = copy.deepcopy(engine)
    run.config = PolicyConfig(max_overtakes=6)
    large = SimRequest("large", 0.05, 1000, 200, "a")  # 75 of 80 pages
    crowd = [SimRequest(f"s{i}", 0.004 * i, 40, 20, adapter) for i, adapter in enumerate(order)]
    admitted: list[str] = []
    run.observe = lambda snapshot, decision: admitted.extend(decision.admit)
    run.run([large, *crowd])
    later = {r.id for r in crowd if r.arrival > large.arrival}
    before = [i for i in admitted[: admitted.index("large")] if i in later]
    assert len(before) <= 6


@quick
@given(
    gaps=st.lists(st.floats(0.06, 0.2), min_size=1, max_size=14),
    lengths=st.lists(st.tuples(st.integers(1, 250), st.integers(1, 30)), min_size=14, max_size=14),
    jobs=JOBS,
    tpot=st.sampled_from([12.0, 15.0, 25.0, 60.0]),
)
@example(  # the last one finds no KV pages: training must leave the others the time to end
    gaps=[0.125] * 6 + [0.0625] * 4 + [0.060546875],
    lengths=[(1, 1)] * 3 + [(35, 30), (115, 30), *[(147, 30)] * 3, (211, 30), (35, 30), (99, 30)],
    jobs=[SimJob("", 256)],
    tpot=25.0,
)
@example(  # the eighth lacks KV pages: a later one must not take those that come back just then
    gaps=[0.0625, 0.09375, 0.0625, 0.140625, 0.078125, 0.1875, 0.0625, 0.09375, 0.0625],
    lengths=[(1, 1), (1, 18), (127, 18), (205, 20), (168, 9), (198, 11), (168, 9), (240, 1), (171, 6)],
    jobs=[SimJob("", 512)],
    tpot=60.0,
)
def test_the_promise_is_kept_under_a_feasible_load(
    engine: Simulator, gaps: list[float], lengths: list[tuple[int, int]], jobs: list[SimJob], tpot: float
) -> None:
    """Feasible: any step of inference rows takes less than TPOT (10.4 ms at most), and queues stay short."""
    run = copy.deepcopy(engine)
    run.slo = SLOConfig(ttft_ms=150.0, tpot_ms=tpot)
    requests, at = [], 0.0
    for gap, (prompt, output) in zip(gaps, lengths, strict=False):
        at += gap
        requests.append(SimRequest("", at, prompt, output))
    run.run(named(requests), named(jobs))
    assert all(r.tpot_ms <= tpot + 1e-6 for r in requests)
    assert all(b - a <= 4 * tpot / 1e3 + 1e-9 for r in requests for a, b in zip(r.times, r.times[1:], strict=False))
    assert all(r.ttft_ms <= 150 for r in requests)


def test_training_gets_on_under_a_promise(engine: Simulator) -> None:
    run = copy.deepcopy(engine)
    run.slo = SLOConfig(tpot_ms=20.0)
    job = SimJob("a", 256)
    requests = [SimRequest(f"r{i}", 0.0, 32, 100) for i in range(8)]
    run.run(requests, [job])
    alone = 100 * (5 + 0.02 * 16) / 1e3
    assert max(r.tpot_ms for r in requests) <= 20
    assert run.now > 3 * alone and job.steps > 20  # three quarters of the time went to training


def test_a_decision_is_a_function_and_replays_from_a_trace(engine: Simulator, tmp_path: Path) -> None:
    run = copy.deepcopy(engine)
    path = tmp_path / "trace.jsonl"
    requests = [SimRequest(f"r{i}", 0.01 * i, 90, 5, "ab"[i % 2]) for i in range(6)]
    with open(path, "w") as file:
        run.observe = lambda snapshot, decision: trace.write(file, snapshot, decision)
        run.run(requests, [SimJob("a", 256), SimJob("b", 512, 2)], [ScoreView(id="s", tokens=100)])
    lines = list(trace.read(path))
    assert len(lines) > 8
    for snapshot, decision in lines:
        before = copy.deepcopy(snapshot)
        assert decide(snapshot, run.latency, run.config) == decision == decide(snapshot, run.latency, run.config)
        assert snapshot == before


def test_a_decision_is_quick(engine: Simulator, buckets: tuple[Bucket, ...]) -> None:
    """A step of an 8B model takes 5 ms; the decision must hide behind it, with full queues."""
    from timeit import timeit

    run = copy.deepcopy(engine)
    run.slots, run.pages = 16, 4000
    requests = [SimRequest(f"r{i}", 0.0, 40, 50, f"a{i % 32}") for i in range(256)]
    jobs = [SimJob(f"j{i}", 256, 8) for i in range(8)]
    seen: list[Snapshot] = []
    run.observe = lambda snapshot, decision: seen.append(snapshot)
    run.run(requests, jobs, until=0.2)
    assert run.latency.known((FORWARD, buckets[0].name))
    assert min(timeit(lambda: decide(seen[-1], run.latency, run.config), number=5) / 5 for _ in range(5)) < 0.02
