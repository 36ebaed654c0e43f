"""Adapters on the device go before those that are only staged, and hold nobody up for long."""

from loquetier_jax.config import Bucket
from loquetier_jax.schedule.latency import LatencyModel
from loquetier_jax.schedule.types import Fairness, Prefilling
from tests.schedule.test_policy import Case, waiting


def test_resident_adapters_go_first_but_only_so_often(buckets: tuple[Bucket, ...], latency: LatencyModel) -> None:
    """One prompt a step: `w0` needs an adapter that is staged, and later ones keep coming for those on the device."""
    case, only = Case(buckets, latency, max_overtakes=3), tuple(b for b in buckets if b.prefill == 64 and not b.packs)
    staged, fairness, admitted = waiting(0, "late", 64, adapter_pages=1, resident=False), Fairness(), []
    for i in range(1, 9):
        d = case(waiting=(staged, waiting(i, f"a{i}", 64, adapter_pages=1)), buckets=only, fairness=fairness)
        admitted += d.admit
        fairness = d.fairness
        if "w0" in d.admit:
            break
    assert admitted == ["w1", "w2", "w3", "w0"] and fairness.overtaken == {}
    prefilling = (Prefilling(id="p", arrival=9.0, remaining=64),)
    assert case(waiting=(staged,), prefilling=prefilling, buckets=only).prefill[0][0] == "p"
    together = case(waiting=(staged, *(waiting(i, "a", 40) for i in range(1, 4))))
    assert together.admit == ("w1", "w2", "w3", "w0") and together.fairness.overtaken == {}
    assert case(waiting=(staged,)).admit == ("w0",), "with nobody to step back for, it waits for nothing"
