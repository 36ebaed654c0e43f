"""Fair shares: backlogged names stay within one charge, pauses earn nothing, leads are kept."""

from hypothesis import given, settings
from hypothesis import strategies as st

from loquetier_jax.schedule.fairness import FairShare, pack_order
from loquetier_jax.schedule.types import JobView


@settings(deadline=None, max_examples=60)
@given(
    charges=st.lists(st.floats(0.5, 9), min_size=1, max_size=60),
    names=st.integers(1, 5),
    rebuild=st.booleans(),
)
def test_backlogged_names_stay_within_one_charge(charges: list[float], names: int, rebuild: bool) -> None:
    active = [f"n{i}" for i in range(names)]
    share, received = FairShare({}, active), dict.fromkeys(active, 0.0)
    for charge in charges:
        name = share.first(active)
        share.charge(name, charge)
        received[name] += charge
        share = FairShare(share.state(), active) if rebuild else share
        assert max(received.values()) - min(received.values()) <= max(charges) + 1e-6


def test_a_pause_earns_nothing_and_a_lead_is_kept() -> None:
    share = FairShare({}, ["a", "b"])
    share.charge("a", 5)
    share.charge("b", 7)
    share = FairShare(share.state(), ["a"])  # b pauses, two ahead
    assert share.state()["b"] == 2
    share.charge("a", 1)
    back = FairShare(share.state(), ["a", "b"])
    assert (back.lead("a"), back.lead("b")) == (0, 1)
    for _ in range(10):
        share.charge("a", 1)
        share = FairShare(share.state(), ["a"])
    back = FairShare(share.state(), ["a", "b", "new"])
    assert [back.lead(n) for n in ("a", "b", "new")] == [0, 0, 0]


def jobs(*packs: int) -> list[JobView]:
    named = zip("abc", packs, strict=False)
    return [JobView(name=n, status="ready", pack_tokens=64, packs=p) for n, p in named]


def test_packs_are_dealt_in_turn() -> None:
    share = FairShare({}, "abc")
    share.charge("b", 1)
    assert pack_order(jobs(3, 3, 1), share, 8, max_lead=1) == ["a", "c", "a", "b"]
    assert pack_order(jobs(3, 3, 1), share, 3, max_lead=1) == ["a", "c", "a"]
    assert pack_order(jobs(3, 3, 1), share, 8, max_lead=4) == ["a", "c", "a", "b", "a", "b", "b"]
    assert share.state() == {"a": 0.0, "b": 1.0, "c": 0.0}
    # c wants service but is not ready: nobody runs further ahead of it than max_lead
    assert pack_order(jobs(3, 3), share, 8, max_lead=1) == ["a"]
    assert pack_order(jobs(3), FairShare({}, "a"), 2, max_lead=1) == ["a", "a"]
