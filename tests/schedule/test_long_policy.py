"""Single decisions about prompts of many steps: what they owe, and to whom."""

import dataclasses

import pytest

from loquetier_jax.config import Bucket
from loquetier_jax.schedule.latency import LatencyModel
from loquetier_jax.schedule.types import Fairness, Prefilling
from tests.schedule.test_policy import Case, running, waiting


@pytest.fixture
def case(buckets: tuple[Bucket, ...], latency: LatencyModel) -> Case:
    return Case(buckets, latency)


def test_a_long_prompt_owes_others_what_it_took(case: Case) -> None:
    """The largest step has 256 prompt rows: more than eight of these are long."""
    long = Prefilling(id="long", arrival=1.0, remaining=4000, done=96)
    d = case(prefilling=(long,), running=running(3))
    assert d.prefill == (("long", 256),)
    assert d.fairness.long_ms == pytest.approx(-(5 + 0.02 * 272 - 5.08))
    short = Prefilling(id="short", arrival=2.0, remaining=64)
    owing = {"fairness": d.fairness, "running": running(3)}
    assert case(prefilling=(long, short), **owing).prefill == (("short", 64),), "not behind it, though it came later"
    d = case(prefilling=(long,), **owing)
    assert d.prefill == () and d.decode and d.fairness.long_ms == pytest.approx(-(5 + 0.02 * 272 - 5.08) + 5.08)
    d = case(prefilling=(long,), running=running(3), fairness=d.fairness)
    assert (d.prefill, d.fairness.long_ms) == ((), 0.0), "paid back"
    assert case(prefilling=(long,), running=running(3), fairness=d.fairness).prefill
    assert case(prefilling=(long,), fairness=Fairness(long_ms=-100.0)).prefill, "nobody else is there"
    blocked = waiting(0, pages=10_000)
    d = case(prefilling=(long,), waiting=(blocked,), fairness=Fairness(long_ms=-100.0))
    assert d.prefill == (("long", 256),), "the others have no room"
    short = dataclasses.replace(long, remaining=1000)
    assert case(prefilling=(short,), **owing).prefill, "eight steps are not long"


def test_a_long_prompt_owes_nothing_to_those_who_have_no_room(case: Case) -> None:
    """Its debt would grow by every step, and the next long prompt would pay for all of them."""
    long = Prefilling(id="long", arrival=1.0, remaining=40_000)
    blocked, fairness = waiting(0, pages=10_000), Fairness()
    for _ in range(20):
        fairness = case(prefilling=(long,), waiting=(blocked,), fairness=fairness).fairness
    assert -15 < fairness.long_ms < 0, "one step's worth"


def test_what_is_cached_does_not_make_a_prompt_long(case: Case) -> None:
    chat = waiting(0, prompt=50, done=40_000)
    d = case(waiting=(chat,), running=running(3), fairness=Fairness(long_ms=-100.0))
    assert d.prefill == (("w0", 50),)


def test_with_a_share_of_one_long_prompts_are_like_others(
    buckets: tuple[Bucket, ...], latency: LatencyModel
) -> None:
    case = Case(buckets, latency, long_prompt_share=1.0)
    long = Prefilling(id="long", arrival=1.0, remaining=4000)
    d = case(prefilling=(long,), running=running(3))
    assert d.prefill and d.fairness.long_ms == 0
