"""The prefix cache against a model without trees: every page with the whole text that it is the end of."""

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from loquetier_jax.errors import CapacityError, IntegrityError
from loquetier_jax.serve import kv as kv_module
from loquetier_jax.serve.kv import KVPages
from loquetier_jax.serve.prefix import PrefixCache

SIZE, PAGES = 2, 14
TOKENS = st.sampled_from([0, 0, 0, 1])
SCOPES = st.sampled_from([*([(None, None)] * 4), (None, "salt"), (1, None), (1, "salt")])
RARELY = st.sampled_from([False, False, False, True])


class Asker:
    """A request of the machine, with the number of its tokens that are known to be written."""

    def __init__(self, scope, prompt, most, reads):
        self.scope, self.prompt, self.output, self.reads = scope, prompt, [], reads
        self.num_tokens, self.pages, self.prefix, self.entered = len(prompt) + most, (), None, 0

    def texts(self, count):
        """What its first `count` pages are the ends of."""
        tokens = [*self.prompt, *self.output]
        return [(self.scope, tuple(tokens[: SIZE * (i + 1)])) for i in range(count)]


class CacheMachine(RuleBasedStateMachine):
    """Requests that come, write, share, end and fail."""

    def __init__(self):
        super().__init__()
        self.kv = KVPages(PAGES + 1, SIZE, prefix_caching=True)
        self.askers = []
        self.cached = {}  # text -> page
        self.ready, self.resting = [], []  # cached pages that nobody uses, in the order in which they are evicted
        self.quarantine = {}  # page -> epoch
        self.last = {}  # page -> last step dispatched by those that released it
        self.dispatched = self.completed = 0

    # The model.

    def used(self):
        return [page for asker in self.askers for page in asker.pages]

    def num_free(self):
        return PAGES - len({*self.used(), *self.ready, *self.resting, *self.quarantine})

    def leave(self, page):
        """Out of the cache and unused."""
        if page in self.ready or page in self.resting:
            (self.ready if page in self.ready else self.resting).remove(page)
            if self.last[page] > self.completed:
                self.quarantine[page] = self.last[page]

    def remove(self, text):
        """With all texts that it begins."""
        scope, tokens = text
        for other in [t for t in self.cached if t[0] == scope and t[1][: len(tokens)] == tokens]:
            self.leave(self.cached.pop(other))

    def readable(self, asker):
        pages = []
        for text in asker.texts((len(asker.prompt) - 1) // SIZE if asker.reads else 0):
            if text not in self.cached:
                break
            pages.append(self.cached[text])
        return pages

    def release(self, asker, epoch):
        self.askers.remove(asker)
        for page in reversed([p for p in asker.pages if p not in self.used()]):
            if page in self.cached.values():
                self.last[page] = max(self.last.get(page, 0), epoch)
                (self.ready if self.last[page] <= self.completed else self.resting).append(page)
            elif epoch > self.completed:
                self.quarantine[page] = epoch

    # What happens.

    @rule(scope=SCOPES, prompt=st.lists(TOKENS, min_size=1, max_size=8), apart=RARELY, undo=RARELY, data=st.data())
    def reserve(self, scope, prompt, apart, undo, data):
        asker = Asker(scope, prompt, data.draw(st.integers(1, 5)), not apart)
        asker.prefix = self.kv.prefix(prompt, scope, reads=not apart)
        shared = self.readable(asker)
        assert self.kv.look_up(asker.prefix) == SIZE * len(shared)
        count = -(-asker.num_tokens // SIZE) - len(shared)
        taken = count + sum(page in self.ready for page in shared)
        if taken > self.num_free() + len(self.ready):
            with pytest.raises(CapacityError, match=f"{taken} requested"):
                self.kv.reserve(asker.num_tokens, asker.prefix)
            return
        for pages in (self.ready, self.resting):
            pages[:] = [page for page in pages if page not in shared]
        self.askers.append(asker)
        asker.pages, asker.entered = tuple(shared), len(shared)
        while self.num_free() < count:
            self.remove(next(text for text, page in self.cached.items() if page == self.ready[0]))
        got = self.kv.reserve(asker.num_tokens, asker.prefix)
        assert list(got[: len(shared)]) == shared and self.kv.shared_tokens(asker.prefix) == SIZE * len(shared)
        new = got[len(shared) :]
        everywhere = {*self.used(), *self.ready, *self.resting, *self.quarantine}
        assert len(set(new)) == count and not set(new) & everywhere
        for page in new:
            self.last.pop(page, None)
        asker.pages = got
        if undo:  # no slot
            self.kv.free(got, 0)
            self.release(asker, 0)
        elif data.draw(st.booleans()):
            self.accept(data, 3)

    @precondition(lambda self: self.askers)
    @rule(data=st.data(), count=st.integers(1, 4))
    def accept(self, data, count):
        asker = data.draw(st.sampled_from(self.askers[::-1]))
        for _ in range(min(count, asker.num_tokens - len(asker.prompt) - len(asker.output))):
            asker.output.append(data.draw(TOKENS))
            self.kv.enter(asker.prefix, asker.pages, asker.prompt, asker.output)
            texts = asker.texts((len(asker.prompt) + len(asker.output) - 1) // SIZE)
            if len(texts) > asker.entered:
                asker.entered = len(texts)
                for text, page in zip(texts, asker.pages, strict=False):
                    self.cached.setdefault(text, page)

    @precondition(lambda self: self.askers)
    @rule(data=st.data(), failed=RARELY)
    def end(self, data, failed):
        asker = data.draw(st.sampled_from(self.askers))
        if failed:
            self.kv.drop(asker.pages)
            for text in [text for text, page in self.cached.items() if page in asker.pages]:
                self.remove(text)
        self.kv.free(asker.pages, self.dispatched)
        self.release(asker, self.dispatched)

    @rule(version=st.sampled_from([1, 2, 2, 2, 2, "all"]))
    def forget(self, version):
        if version == "all":
            self.kv.clear_cache()
        else:
            self.kv.drop_version(version)
        for text in [text for text in self.cached if version in (text[0][0], "all")]:
            self.remove(text)

    @rule()
    def dispatch(self):
        self.dispatched += 1

    @rule(data=st.data())
    def complete(self, data):
        self.completed = data.draw(st.integers(self.completed, self.dispatched))
        self.kv.complete(self.completed)
        self.ready += [page for page in self.resting if self.last[page] <= self.completed]
        self.resting = [page for page in self.resting if self.last[page] > self.completed]
        self.quarantine = {page: epoch for page, epoch in self.quarantine.items() if epoch > self.completed}

    @invariant()
    def adds_up(self):
        self.kv.check_integrity([asker.pages for asker in self.askers])
        assert self.kv.num_free == self.num_free() + len(self.ready)
        assert self.kv.num_cached == len(self.ready) + len(self.resting)


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.slow
def test_the_cache_at_length():
    run_state_machine_as_test(CacheMachine, settings=settings(TestCache.settings, max_examples=500))


def served(kv, prompt, output=(1,), scope=(None, None)):
    """A request with all its output; (pages, cached tokens)."""
    prefix = kv.prefix(prompt, scope)
    kv.look_up(prefix)
    pages = kv.reserve(len(prompt) + len(output), prefix)
    kv.enter(prefix, pages, prompt, output)
    return pages, kv.shared_tokens(prefix)


def test_what_is_found():
    """Full pages of written tokens, never the last token of a prompt, and nothing of another scope."""
    kv = KVPages(64, SIZE, prefix_caching=True)
    served(kv, [1, 2, 3, 4, 5], (6, 7, 8))  # 8 was not written
    for prompt, count in (
        ([1, 2], 0),
        ([1, 2, 9], 2),
        ([1, 2, 3, 4], 2),
        ([1, 2, 3, 4, 5, 6, 7], 6),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], 6),
        ([2, 3, 4, 5, 6], 0),
    ):
        assert kv.look_up(kv.prefix(prompt, (None, None))) == count, prompt
        assert kv.look_up(kv.prefix(prompt, (None, None), reads=False)) == 0
        for scope in ((1, None), (None, "a"), (1, "a")):
            assert kv.look_up(kv.prefix(prompt, scope)) == 0


def test_what_is_wanted_again_stays():
    """The least recently used goes first, of one text its end before its beginning."""
    kv = KVPages(8, SIZE, prefix_caching=True)
    for prompt in ([1, 1, 1, 1], [2, 2, 2, 2], [1, 1, 1, 1]):  # two of three pages of each are cached
        pages, cached = served(kv, prompt)
        kv.free(pages, 0)
    assert cached == 2 and kv.num_free == 7 and kv.num_cached == 4

    def found():
        return [kv.look_up(kv.prefix([n] * 5, (None, None))) for n in (1, 2)]

    for pages, want in ((3, [4, 4]), (1, [2, 4]), (1, [2, 2]), (1, [2, 0]), (1, [0, 0])):
        kv.reserve(SIZE * pages)
        assert found() == want


def test_pages_in_use_are_counted_once_and_wait_for_their_step():
    kv = KVPages(8, SIZE, prefix_caching=True)
    first, _ = served(kv, [1, 1, 1, 1, 1])
    second, cached = served(kv, [1, 1, 1, 1, 2])
    assert cached == 4 and second[:2] == first[:2] and kv.num_free == 3
    kv.check_integrity([first, second])
    assert kv.returned(first) == kv.returned(second) == 1
    for wrong in ([first], [first, first], [first, second, second]):
        with pytest.raises(IntegrityError, match=r"KV pages: got .* in use"):
            kv.check_integrity(wrong)
    kv.free(first, 1)
    kv.free(second, 2)
    kv.complete(1)
    kv.check_integrity([])
    assert kv.num_free == 4 and kv.num_cached == 2, "two are free, one rests, and so do those that are cached"
    third = kv.prefix([1, 1, 1, 1, 3], (None, None))
    assert kv.look_up(third) == 4 and kv.needed(6, third) == 1, "who reads them runs after the step that wrote them"
    kv.complete(2)
    assert kv.num_free == 7 and kv.needed(6, third) == 3


def test_without_a_cache_nothing_is_kept():
    kv = KVPages(8, SIZE)
    pages, cached = served(kv, [1, 1, 1, 1])
    kv.free(pages, 0)
    assert cached == kv.num_cached == kv.look_up(kv.prefix([1, 1, 1, 1], (None, None))) == 0


def test_a_lost_block_or_a_wrong_count_would_be_seen(monkeypatch):
    """`rest` that keeps nothing, and a user that is not counted."""
    kv = KVPages(8, SIZE, prefix_caching=True)
    pages, _ = served(kv, [1, 1, 1, 1])
    monkeypatch.setattr(PrefixCache, "rest", lambda self, page, epoch: True)
    kv.free(pages, 0)
    with pytest.raises(IntegrityError):
        kv.check_integrity([])
    monkeypatch.undo()
    kv = KVPages(8, SIZE, prefix_caching=True)
    pages, _ = served(kv, [1, 1, 1, 1])
    monkeypatch.setattr(PrefixCache, "hold", lambda self, page: None)
    kv.free(pages, 0)
    pages, _ = served(kv, [1, 1, 1, 1])
    with pytest.raises(IntegrityError):
        kv.check_integrity([pages])


def test_hashes_would_be_seen(monkeypatch):
    """Keys that may be equal for two texts: the machine finds them."""
    monkeypatch.setattr(kv_module, "block_keys", lambda ids, size: [b"x"] * (len(ids) // size))
    once = {"phases": [Phase.generate], "database": None, "report_multiple_bugs": False}
    quick = settings(TestCache.settings, max_examples=500, derandomize=True, **once)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(CacheMachine, settings=quick)
