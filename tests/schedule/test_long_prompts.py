"""A prompt of many steps beside others, on a simulated clock: they keep half of their speed, and it comes through."""

import dataclasses
import statistics

import pytest

from benchmarks.scheduling.simulate import Simulator
from benchmarks.scheduling.simulated import SimRequest
from loquetier_jax.config import BLOCK, Bucket
from loquetier_jax.schedule.chunks import affordable
from loquetier_jax.schedule.latency import LatencyModel, chunk_pairs
from loquetier_jax.schedule.policy import PolicyConfig

PAIR_MS = 65 / chunk_pairs(20_000, 256)  # at its end, a chunk's attention takes six times what its other rows take


@pytest.fixture
def simulator(buckets: tuple[Bucket, ...], own_latency: LatencyModel) -> Simulator:
    own_latency.seed_attention(kv_token_ms=0.0, pair_ms=PAIR_MS)
    return Simulator(buckets=buckets, latency=own_latency, slots=16, pages=4096)


def decoders(count: int, output: int) -> list[SimRequest]:
    return [SimRequest(f"d{i}", 0.0, 16, output, "a") for i in range(count)]


def test_running_requests_keep_half_their_speed(simulator: Simulator) -> None:
    alone = decoders(8, 400)
    simulator.run(alone)
    undisturbed = statistics.median(r.tpot_ms for r in alone)
    beside, long = decoders(8, 400), SimRequest("long", 0.1, 20_000, 4, "b")
    dataclasses.replace(simulator, now=0.0).run([*beside, long])
    assert max(r.tpot_ms for r in beside) <= 2 * undisturbed
    assert long.finished and long.ttft_ms < 1e3 * max(r.times[-1] for r in beside) * 3


def test_without_a_share_they_do_not(simulator: Simulator) -> None:
    """What the rule is for: each token would wait for a whole chunk."""
    greedy = dataclasses.replace(simulator, config=PolicyConfig(long_prompt_share=1.0))
    beside, long = decoders(8, 100), SimRequest("long", 0.1, 20_000, 4, "b")
    greedy.run([*beside, long])
    assert max(r.tpot_ms for r in beside) > 3 * 5.3


def test_short_prompts_do_not_wait_for_all_of_a_long_one(simulator: Simulator) -> None:
    """Of the same adapter, too, whose requests are served in order otherwise."""
    long = SimRequest("long", 0.0, 20_000, 4, "a")
    short = [SimRequest(f"s{i}", 0.2 + 0.05 * i, 60, 2, "a") for i in range(40)]
    simulator.run([long, *short])
    assert max(r.ttft_ms for r in short) < 400 < 1500 < long.ttft_ms


def test_a_long_prompt_alone_runs_at_full_speed(simulator: Simulator) -> None:
    long = SimRequest("long", 0.0, 20_000, 1, "a")
    simulator.run([long])
    steps = -(-20_000 // 256)
    attention = PAIR_MS * chunk_pairs(0, 20_000)
    assert long.ttft_ms == pytest.approx(steps * (5 + 0.02 * 272) + attention, rel=0.02)


@pytest.mark.parametrize("start", [0, 7, 1000])
def test_affordable_is_the_longest_chunk_in_blocks(start: int) -> None:
    for pairs in (0, 1, 100, 135, 136, 137, 5000, 10**6):
        n = affordable(start, pairs)
        assert n % BLOCK == 0 and chunk_pairs(start, n) <= pairs < chunk_pairs(start, n + BLOCK)
    assert affordable(start, -5) == 0 and affordable(start, float("inf")) == float("inf")
