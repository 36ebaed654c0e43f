"""Pages and slots always add up, and nothing is handed out while a dispatched step may still touch it."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loquetier_jax.errors import CapacityError, ConfigError, IntegrityError
from loquetier_jax.serve.kv import KVPages


class PagesMachine(RuleBasedStateMachine):
    """Random owners against a plain model: who owns what, and until which step a page must rest."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = KVPages(num_pages=12, page_size=16)
        self.owners: list[list[int]] = []
        self.resting: dict[int, int] = {}  # page -> epoch
        self.dispatched = self.completed = 0
        self.pages.complete(0)

    @rule(tokens=st.integers(1, 100))
    def reserve(self, tokens: int) -> None:
        need, free = -(-tokens // 16), 11 - sum(map(len, self.owners)) - len(self.resting)
        assert self.pages.pages_for(tokens) == need and self.pages.num_free == free
        if need > free:
            with pytest.raises(CapacityError, match=f"{need} requested, {free} free"):
                self.pages.reserve(tokens)
            return
        got = self.pages.reserve(tokens)
        assert len(set(got)) == need and 0 not in got
        assert not set(got) & set(self.resting)
        self.owners.append(got)

    @rule()
    def dispatch(self) -> None:
        self.dispatched += 1

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        pages = self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1)))
        self.pages.free(pages, self.dispatched)
        if self.dispatched > self.completed:
            self.resting.update(dict.fromkeys(pages, self.dispatched))

    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        self.completed = data.draw(st.integers(self.completed, self.dispatched))
        self.pages.complete(self.completed)
        self.resting = {p: e for p, e in self.resting.items() if e > self.completed}

    @invariant()
    def adds_up(self) -> None:
        self.pages.check_integrity(self.owners)


TestPages = PagesMachine.TestCase
TestPages.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_a_wrong_free_changes_nothing() -> None:
    pages = KVPages(num_pages=6, page_size=16)
    mine = pages.reserve(33)
    for wrong in ([mine[0], mine[0]], [*mine, 5], [0], [99]):
        with pytest.raises(IntegrityError, match="expected distinct ids that are taken"):
            pages.free(wrong, 0)
        pages.check_integrity([mine])
    pages.free(mine, -1)
    with pytest.raises(IntegrityError):
        pages.free(mine, -1)
    assert pages.num_free == pages.num_pages == 5


def test_integrity_finds_pages_that_nobody_owns() -> None:
    pages = KVPages(num_pages=6, page_size=16)
    one, two = pages.reserve(16), pages.reserve(16)
    for owned in ([one], [one, two, two], [one, two, [5]]):
        with pytest.raises(IntegrityError, match="in use"):
            pages.check_integrity(owned)


def test_bad_sizes() -> None:
    with pytest.raises(ConfigError, match="num_pages: got 1"):
        KVPages(num_pages=1, page_size=16)
