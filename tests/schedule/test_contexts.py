"""Buckets with a limit of context: used where it suffices, never where it does not, and nobody starves behind it."""

import dataclasses

import pytest

from benchmarks.scheduling.simulate import Simulator
from benchmarks.scheduling.simulated import SimRequest
from loquetier_jax.config import Bucket, EngineConfig
from loquetier_jax.errors import ConfigError
from loquetier_jax.schedule.latency import FORWARD, LatencyModel
from loquetier_jax.schedule.policy import PolicyConfig, decide
from loquetier_jax.schedule.types import Decision, Decoding, Prefilling, Snapshot, Waiting

SHORT, LONG = Bucket(decode=8, context=512), Bucket(decode=8)
FAST, SLOW = Bucket(prefill=256, chunks=4, decode=8, context=512), Bucket(prefill=64, chunks=4, decode=8)
BUCKETS = (SHORT, LONG, FAST, SLOW)


@pytest.fixture
def latency() -> LatencyModel:
    model = LatencyModel()
    for b, ms in ((SHORT, 5.0), (LONG, 6.0), (FAST, 8.0), (SLOW, 7.0)):
        model.seed((FORWARD, b.name), [ms], b.rows)
    return model


def decided(latency: LatencyModel, contexts: tuple[int, ...] = (), prompts: tuple[tuple[int, int], ...] = ()):
    running = tuple(
        Decoding(id=f"r{i}", first_token_time=0.0, last_token_time=0.9, num_output=2, context=n)
        for i, n in enumerate(contexts)
    )
    prefilling = tuple(
        Prefilling(id=f"p{i}", arrival=0.1 * i, done=done, remaining=left) for i, (done, left) in enumerate(prompts)
    )
    snapshot = Snapshot(now=1.0, buckets=BUCKETS, running=running, prefilling=prefilling, free_slots=8)
    return decide(snapshot, latency, PolicyConfig())


def fits(decision: Decision, context: int) -> bool:
    return not decision.bucket.context or context <= decision.bucket.context


@pytest.mark.parametrize("context", [1, 511, 512, 513, 10_000])
def test_the_longest_context_decides(latency: LatencyModel, context: int) -> None:
    assert decided(latency, (10, context)).bucket == (SHORT if context <= 512 else LONG)


@pytest.mark.parametrize(
    ("done", "left", "bucket", "tokens"),
    [
        (0, 100, FAST, 100),
        (256, 256, FAST, 256),
        (256, 257, FAST, 256),  # the last token needs more context, in another step
        (512, 1, SLOW, 1),
        (496, 100, SLOW, 64),  # sixteen rows would fit the limit; more a millisecond go without it
        (5000, 300, SLOW, 64),
    ],
)
def test_chunks_stay_within_the_limit(latency: LatencyModel, done: int, left: int, bucket: Bucket, tokens: int) -> None:
    d = decided(latency, (), ((done, left),))
    assert (d.bucket, d.prefill) == (bucket, (("p0", tokens),))


def test_a_long_context_that_decodes_keeps_prompts_off_the_limited_bucket(latency: LatencyModel) -> None:
    d = decided(latency, (2000,), ((0, 100),))
    assert d.bucket == SLOW and d.decode and d.prefill == (("p0", 64),)


def test_nobody_is_passed_over_because_the_limited_bucket_is_faster(latency: LatencyModel) -> None:
    first = decided(latency, (), ((5000, 300), (0, 256)))
    assert (first.bucket, first.prefill) == (SLOW, (("p0", 64),))
    assert decided(latency, (), ((0, 256), (5000, 300))).bucket == FAST


def test_deep_prompts_come_through_beside_a_stream_of_short_ones(latency: LatencyModel) -> None:
    seen: list[tuple[Decision, int]] = []

    def observe(snapshot: Snapshot, decision: Decision) -> None:
        if decision.bucket is not None:
            done = {p.id: p.done for p in snapshot.prefilling}
            ends = [done.get(name, 0) + tokens for name, tokens in decision.prefill]
            seen.append((decision, max([*(r.context for r in snapshot.running), *ends])))

    deep = [SimRequest(f"deep{i}", 0.05 * i, 900, 4, "a") for i in range(3)]
    short = [SimRequest(f"s{i}", 0.01 * i, 200, 4, "a") for i in range(100)]
    simulator = Simulator(buckets=BUCKETS, latency=latency, slots=8, pages=4096, observe=observe)
    simulator.run([*deep, *short])
    assert all(fits(decision, context) for decision, context in seen)
    assert max(r.ttft_ms for r in deep) < 600
    assert {d.bucket for d, _ in seen} >= {SHORT, FAST, SLOW}


def test_a_limit_beyond_every_request_is_none() -> None:
    """Written as a number, it once hid a deep prompt from the rule above, and the prompt starved."""
    whole = dataclasses.replace(SLOW, context=4096), dataclasses.replace(LONG, context=5000)
    assert EngineConfig(max_model_len=4096, buckets=(SHORT, FAST, *whole)).buckets == (SHORT, FAST, SLOW, LONG)


def test_no_more_are_admitted_than_decode_without_a_job(latency: LatencyModel) -> None:
    """The bucket of a job has more decode rows, and goes with the job; short contexts grow."""
    wide = Bucket(packs=1, pack_tokens=64, prefill=64, chunks=4, decode=32), Bucket(decode=16, context=512)
    queue = tuple(Waiting(id=f"w{i}", arrival=0.0, prompt_tokens=8, pages=1) for i in range(20))
    running = tuple(
        Decoding(id=f"r{i}", first_token_time=0.0, last_token_time=0.9, num_output=2, context=9) for i in range(6)
    )
    snapshot = Snapshot(
        now=1.0, buckets=(*BUCKETS, *wide), running=running, waiting=queue, free_slots=32, free_pages=99
    )
    assert len(decide(snapshot, latency, PolicyConfig()).admit) == 8 - 6


def test_limits_that_could_leave_requests_stranded_are_refused() -> None:
    def config(*buckets: Bucket) -> EngineConfig:
        return EngineConfig(max_model_len=1024, buckets=buckets)

    config(*BUCKETS)
    train = Bucket(packs=1, pack_tokens=64, prefill=64, chunks=4, decode=8)  # there while a job runs, not before
    config(dataclasses.replace(FAST, context=1024), SHORT, LONG)  # as long as any request
    for buckets in ((SHORT, FAST), (LONG, FAST), (SHORT, FAST, train)):
        with pytest.raises(ConfigError, match=r"buckets: got .*without a limit of context and without training packs"):
            config(*buckets)
    with pytest.raises(ConfigError, match=r"Bucket\.context: got 64, expected 0 without prefill and decode rows"):
        Bucket(score_packs=1, score_tokens=64, context=64)
    assert FAST.name == "prefill256-decode8-context512"
