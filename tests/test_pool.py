"""Ids whose reuse waits for the steps that may still touch them."""

import pytest

from loquetier_jax.errors import CapacityError, IntegrityError
from loquetier_jax.pool import IdPool


def test_an_id_comes_back_with_its_epoch() -> None:
    pool = IdPool(range(2), "slots")
    (slot,), (other,) = pool.take(1), pool.take(1)
    assert {slot, other} == {0, 1}
    with pytest.raises(CapacityError, match="slots: 1 requested, 0 free"):
        pool.take(1)
    pool.give_back([slot], 3)
    pool.complete(2)
    assert pool.num_free == 0
    pool.complete(3)
    pool.complete(1)  # news of an older step changes nothing
    assert pool.take(1) == (slot,)
    pool.check_integrity([slot, other])
    with pytest.raises(IntegrityError, match=r"not in use \[1\]"):
        pool.check_integrity([slot])
    pool.give_back([other], 3)  # already completed: free at once
    assert pool.num_free == 1
    with pytest.raises(IntegrityError):
        pool.give_back([other], 3)


def test_ids_go_from_owner_to_owner() -> None:
    pool = IdPool(range(1, 6), "adapter pages")
    pages = pool.take(2, "jobs")
    pool.transfer(pages, "jobs", 7)
    assert pool.owned_by(7) == set(pages) and pool.owners() == {7}
    for wrong in (lambda: pool.transfer(pages, "jobs", 8), lambda: pool.give_back(pages, 0, "jobs")):
        with pytest.raises(IntegrityError, match="adapter pages"):
            wrong()
    with pytest.raises(IntegrityError):
        pool.give_back((pages[0], pages[0]), 0, 7)
    pool.give_back(pages, 0, 7)  # no step used them
    assert pool.num_free == 5 and pool.take(5) == (3, 4, 5, *pages)  # the longest free first
