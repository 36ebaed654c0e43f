"""Allocation of KV cache pages to requests, which share those of a common prefix."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

from loquetier_jax.config import require
from loquetier_jax.errors import CapacityError, IntegrityError
from loquetier_jax.pool import IdPool
from loquetier_jax.serve.prefix import Prefix, PrefixCache, Scope, Unused, block_keys

TRASH_PAGE = 0  # padding rows write here; never allocated


class KVPages:
    """Pages of the paged KV cache.

    A request reserves everything it may need at admission, so that it can always finish. A page is free, in quarantine
    (see IdPool), used by one request or several, or cached and used by none. Only full pages whose tokens are final are
    cached, and nobody writes to these: who reads them starts after them.

    Args:
        num_pages: Number of pages, including trash page 0; >= 2.
        page_size: Tokens per page.
        prefix_caching: Whether requests may share the pages of a common prefix.
    """

    def __init__(self, num_pages: int, page_size: int, *, prefix_caching: bool = False) -> None:
        require(num_pages >= 2, "num_pages", num_pages, "an integer >= 2 (page 0 is trash)")
        require(page_size >= 1, "page_size", page_size, "an integer >= 1")
        self.page_size, self.prefix_caching = page_size, prefix_caching
        self._pool = IdPool(range(TRASH_PAGE + 1, num_pages), "KV pages")
        self._cache = PrefixCache()
        self._users: Counter[int] = Counter()  # page -> number of requests that use it, >= 1

    @property
    def num_pages(self) -> int:
        """Number of allocatable pages: all but the trash page."""
        return self._pool.size

    @property
    def num_free(self) -> int:
        """Number of pages that `reserve` can allocate now: those free, and those cached that it may evict."""
        return self._pool.num_free + self._cache.num_evictable

    @property
    def num_cached(self) -> int:
        """Number of cached pages that no request uses."""
        return len(self._cache.unreferenced)

    def pages_for(self, num_tokens: int) -> int:
        """Number of pages needed for `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    # Sharing.

    def prefix(self, ids: Sequence[int], scope: Scope, *, reads: bool = True) -> Prefix | None:
        """What `look_up`, `reserve` and `enter` need to know of a request; None without prefix caching. Thread-safe.

        Args:
            ids: Its prompt.
            scope: Requests of other scopes share nothing with it.
            reads: Whether it may read pages of others; at least its last token is computed in any case.
        """
        if not self.prefix_caching:
            return None
        return Prefix(scope, block_keys(ids, self.page_size), (len(ids) - 1) // self.page_size if reads else 0)

    def look_up(self, prefix: Prefix | None) -> int:
        """Number of prompt tokens that a waiting request need not compute, if it is admitted now."""
        if prefix is None:
            return 0
        self._cache.look_up(prefix)
        return len(prefix.path) * self.page_size

    def needed(self, num_tokens: int, prefix: Prefix | None) -> int:
        """Number of pages of `num_free` that `reserve` would take, after `look_up`.

        Assumes that of its cached blocks the last ones are unreferenced. Not so where a request uses its own copy of a
        prefix, of which others use the end; `reserve` itself is exact.
        """
        count, path = self.pages_for(num_tokens), prefix.path if prefix else ()
        if not path or not self._cache.is_evictable(path[-1].page):  # the usual cases, without a search
            return count - len(path)
        return count - bisect_left(path, True, key=lambda block: self._cache.is_evictable(block.page))

    def returned(self, pages: Sequence[int]) -> int:
        """Number of a request's pages that nobody else uses, assuming that its first ones are those that it shares."""
        users = self._users
        if users[pages[0]] == 1:  # the usual case, without a search
            return len(pages)
        return len(pages) - bisect_left(pages, True, key=lambda page: users[page] == 1)

    def reserve(self, num_tokens: int, prefix: Prefix | None = None) -> tuple[int, ...]:
        """Takes pages for `num_tokens` (prompt + max_tokens), in order of position.

        Args:
            num_tokens: Number of tokens.
            prefix: Of the request: the pages of `prefix.path`, as far as still cached, come first. It does not grow
                after `look_up`, so what was decided after it stays possible.

        Raises:
            CapacityError: not enough are free; nothing was changed.
        """
        shared = self._cache.shared(prefix) if prefix else []
        count = self.pages_for(num_tokens) - len(shared)
        taken = count + sum(map(self._cache.is_evictable, shared))
        if taken > self.num_free:
            raise CapacityError(
                f"KV pages: {taken} requested, {self.num_free} free "
                f"({len(self._users)} in use, {self.num_cached} cached, of {self.num_pages})"
            )
        for page in shared:
            self._cache.hold(page)
        self._give_back(self._cache.evict(count - self._pool.num_free))
        pages = (*shared, *self._pool.take(count))
        self._users.update(pages)
        if prefix:
            prefix.shared = prefix.entered = len(shared)
        return pages

    def shared_tokens(self, prefix: Prefix | None) -> int:
        """Number of prompt tokens on the shared pages of a request, after `reserve`."""
        return 0 if prefix is None else prefix.shared * self.page_size

    def enter(self, prefix: Prefix | None, pages: Sequence[int], prompt: Sequence[int], output: Sequence[int]) -> None:
        """Caches the full pages of a request whose latest output token has been read and is a number.

        That token is the proof: it was computed from the KV of all tokens before it, so these are numbers too, and all
        of them were written by steps that any later step runs after.

        Args:
            prefix: Of the request.
            pages: Its pages.
            prompt, output: Its token ids, accepted ones alone: what was computed ahead of the end is never cached.
        """
        count = (len(prompt) + len(output) - 1) // self.page_size
        if prefix is None or count <= prefix.entered:
            return
        for i in range(len(prefix.keys), count):
            start, stop, n = i * self.page_size, (i + 1) * self.page_size, len(prompt)
            ids = (*prompt[start:stop], *output[max(start - n, 0) : stop - n])
            prefix.keys += block_keys(ids, self.page_size)
        self._cache.enter(prefix, pages, count)

    # The end.

    def free(self, pages: Sequence[int], epoch: int) -> None:
        """Returns pages, to be reused once step `epoch` (the last dispatched that may use them, or 0) has completed.

        Those that are cached stay so, for others to read; so do those that others use.

        Raises:
            IntegrityError: a page is not reserved; nothing was changed.
        """
        wrong = [page for page in pages if not self._users[page]]
        if wrong or len(set(pages)) != len(pages):
            raise IntegrityError(f"KV pages: got {wrong or list(pages)}, expected distinct ids that are taken")
        self._users.subtract(pages)
        unused = [page for page in reversed(pages) if not self._users[page]]
        for page in unused:
            del self._users[page]
        self._pool.give_back([page for page in unused if not self._cache.rest(page, epoch)][::-1], epoch)

    def drop(self, pages: Iterable[int]) -> None:
        """Removes these pages and all that follow them from the cache: nobody reads them any more.

        For requests that ended with an error. Requests that use the pages keep them.
        """
        self._give_back(self._cache.drop(pages))

    def drop_version(self, version: Hashable) -> None:
        """Removes what was computed with an adapter version from the cache."""
        self._give_back(self._cache.drop_version(version))

    def clear_cache(self) -> None:
        """Removes all pages from the cache. Requests that use them keep them."""
        self._give_back(self._cache.clear())

    def _give_back(self, unused: Unused) -> None:
        for page, epoch in unused:
            self._pool.give_back([page], epoch)

    def complete(self, epoch: int) -> None:
        """Records that all steps up to `epoch` have completed."""
        self._pool.complete(epoch)
        self._cache.complete(epoch)

    def check_integrity(self, owned: Iterable[Iterable[int]] | None = None) -> None:
        """Checks that every page is in exactly one state.

        Args:
            owned: If given, the page lists of all live requests: every page must be used by as many as it says.

        Raises:
            IntegrityError: a page is lost or in two states, or `owned` differs from the pages in use.
        """
        self._pool.check_integrity([*self._users, *self._cache.unreferenced])
        self._cache.check_integrity(self._users)
        if owned is None:
            return
        found = Counter(page for pages in owned for page in pages)
        if found != self._users:
            wrong = {page: (found[page], self._users[page]) for page in found | self._users}
            wrong = {page: counts for page, counts in wrong.items() if counts[0] != counts[1]}
            raise IntegrityError(f"KV pages: got {{page: (requests, expected)}} in use {dict(list(wrong.items())[:8])}")
