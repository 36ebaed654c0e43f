"""Prefix cache: which KV pages hold which tokens, so that requests that begin alike compute their beginning once.

Full pages only, in a tree: a block is one page, found by its parent and by its token ids themselves, not by a hash of
them, so that two prefixes are never mistaken for each other. The root of a tree is a scope, (adapter version id, salt):
nothing is found across adapters, versions or salts.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from loquetier_jax.errors import IntegrityError

Scope = tuple[Hashable, str | None]
"""(id of the adapter version, None for the base; cache_salt)."""

Unused = list[tuple[int, int]]
"""(page, last step dispatched that may use it) of pages that have left the cache and that no request uses."""


@dataclass(eq=False, slots=True)
class Block:
    """One cached page: the KV of a page of tokens that follow those of its ancestors. A root has no page.

    Attributes:
        key: Its token ids as bytes; of a root, its scope.
        parent: The block before it; None for a root.
        page: Its page.
        epoch: The last step dispatched by requests that have released the page.
        children: The blocks after it, by key.
        live: Whether it is in the cache; if not, neither are its descendants.
    """

    key: Hashable
    parent: "Block | None" = None
    page: int = 0
    epoch: int = 0
    children: dict[Hashable, "Block"] = field(default_factory=dict)
    live: bool = True


@dataclass(eq=False, slots=True)
class Prefix:
    """A request as the cache sees it.

    Attributes:
        scope: Where it may look, and what it writes belongs.
        keys: Token ids of its full blocks, as far as known; at first those of its prompt.
        readable: Maximum number of blocks that it may read.
        path: The cached blocks of its tokens, from the first on, as of the last call of the cache.
        shared: Number of blocks that it reads, once it is admitted.
        entered: Number of blocks found at admission or entered since.
    """

    scope: Scope
    keys: list[bytes]
    readable: int
    path: list[Block] = field(default_factory=list)
    shared: int = 0
    entered: int = 0


def block_keys(ids: Sequence[int], page_size: int) -> list[bytes]:
    """The keys of the full blocks of `ids`."""
    whole = np.asarray(ids, np.int32).tobytes()
    size = 4 * page_size
    return [whole[at : at + size] for at in range(0, len(whole) - size + 1, size)]


class PrefixCache:
    """The cached blocks, and which of their pages no request uses. Knows nothing of pages outside the cache."""

    def __init__(self) -> None:
        self._roots: dict[Scope, Block] = {}
        self._blocks: dict[int, Block] = {}  # page -> block
        self._resting: dict[int, int] = {}  # unreferenced page -> epoch, whose step has not completed
        self._ready: OrderedDict[int, None] = OrderedDict()  # the other unreferenced pages, least recently used first
        self._completed = 0

    @property
    def num_evictable(self) -> int:
        """Number of pages that `evict` can return, free to be used at once."""
        return len(self._ready)

    @property
    def unreferenced(self) -> set[int]:
        """Cached pages that no request uses."""
        return {*self._ready, *self._resting}

    def is_evictable(self, page: int) -> bool:
        """Whether the page is one of `num_evictable`."""
        return page in self._ready

    def look_up(self, prefix: Prefix) -> None:
        """Finds the blocks that a request may read now; they are in `prefix.path`."""
        self._trim(prefix)
        path, keys = prefix.path, prefix.keys
        block = path[-1] if path else self._roots.get(prefix.scope)
        while block is not None and len(path) < prefix.readable:
            block = block.children.get(keys[len(path)])
            if block is not None:
                path.append(block)

    def shared(self, prefix: Prefix) -> list[int]:
        """The pages of `prefix.path`, without blocks that have left the cache since."""
        self._trim(prefix)
        return [block.page for block in prefix.path]

    def _trim(self, prefix: Prefix) -> None:
        while prefix.path and not prefix.path[-1].live:
            prefix.path.pop()

    def enter(self, prefix: Prefix, pages: Sequence[int], count: int) -> None:
        """Adds a request's first `count` blocks, except those that are cached already, on other pages perhaps.

        Args:
            prefix: With at least `count` keys.
            pages: The request's pages, in order of position; a step dispatched earlier has written these.
            count: Number of blocks.
        """
        self._trim(prefix)
        for i in range(len(prefix.path), count):
            parent = prefix.path[-1] if prefix.path else self._root(prefix.scope)
            key = prefix.keys[i]
            block = parent.children.get(key)
            if block is None:
                block = parent.children[key] = self._blocks[pages[i]] = Block(key, parent, pages[i])
            prefix.path.append(block)
        prefix.entered = count

    def _root(self, scope: Scope) -> Block:
        return self._roots.setdefault(scope, Block(scope))

    def hold(self, page: int) -> None:
        """Records that a request uses a cached page."""
        self._ready.pop(page, None)
        self._resting.pop(page, None)

    def rest(self, page: int, epoch: int) -> bool:
        """Records that the last user of a page has released it.

        Args:
            page: Any page; a request's are to be released last page first, so that they are evicted in that order.
            epoch: The last step dispatched that may use it, 0 if none.

        Returns:
            Whether the page is cached, and stays so; if not, it is the caller's.
        """
        block = self._blocks.get(page)
        if block is None:
            return False
        block.epoch = max(block.epoch, epoch)
        if block.epoch <= self._completed:
            self._ready[page] = None
        else:
            self._resting[page] = block.epoch
        return True

    def complete(self, epoch: int) -> None:
        """Records that all steps up to `epoch` have completed; an older epoch changes nothing."""
        self._completed = max(self._completed, epoch)
        for page in [page for page, last in self._resting.items() if last <= self._completed]:
            del self._resting[page]
            self._ready[page] = None

    def evict(self, count: int) -> Unused:
        """Removes the least recently used unreferenced blocks, at least `count` that are free at once.

        A block goes with all that follow it. Requests hold a prefix from its beginning, so these are unreferenced too,
        and were evicted before it; except where a request has computed its own copy of the beginning.

        Raises:
            IntegrityError: `count` is larger than `num_evictable`; some are lost.
        """
        gone: Unused = []
        while count > 0:
            if not self._ready:
                raise IntegrityError(f"KV pages: {count} more to be evicted, but none is unreferenced")
            removed = self._remove(self._blocks[next(iter(self._ready))])
            count -= sum(epoch <= self._completed for _, epoch in removed)
            gone += removed
        return gone

    def drop(self, pages: Iterable[int]) -> Unused:
        """Removes the blocks on these pages, and all that follow them, whoever uses them."""
        blocks = [self._blocks[page] for page in pages if page in self._blocks]
        return [one for block in blocks if block.live for one in self._remove(block)]

    def drop_version(self, version: Hashable) -> Unused:
        """Removes all blocks of an adapter version."""
        roots = [root for scope, root in self._roots.items() if scope[0] == version]
        return self._drop_below(roots)

    def clear(self) -> Unused:
        """Removes all blocks."""
        return self._drop_below(list(self._roots.values()))

    def _drop_below(self, roots: Sequence[Block]) -> Unused:
        return [one for root in roots for block in list(root.children.values()) for one in self._remove(block)]

    def _remove(self, block: Block) -> Unused:
        parent, unused, left = block.parent, [], [block]
        del parent.children[block.key]
        while left:
            one = left.pop()
            one.live = False
            del self._blocks[one.page]
            if one.page in self._ready or one.page in self._resting:
                unused.append((one.page, one.epoch))
                self.hold(one.page)
            left += one.children.values()
        if parent.parent is None and not parent.children:
            del self._roots[parent.key]
        return unused

    def check_integrity(self, used: Iterable[int]) -> None:
        """Checks the trees against the pages.

        Args:
            used: The pages that requests use.

        Raises:
            IntegrityError: a block is lost or twice in the cache, or a page is neither used nor unreferenced.
        """
        found: dict[int, Block] = {}
        left = list(self._roots.values())
        while left:
            block = left.pop()
            wrong = [c for c in block.children.values() if c.parent is not block or c.page in found or not c.live]
            if wrong or (block.parent is None and not block.children):
                raise IntegrityError(f"prefix cache: pages {[c.page for c in wrong]} are cached twice, or not at all")
            found |= {c.page: c for c in block.children.values()}
            left += block.children.values()
        if found != self._blocks:
            raise IntegrityError(f"prefix cache: lost pages {sorted(found.keys() ^ self._blocks.keys())[:8]}")
        expected = found.keys() - set(used)
        if expected != self.unreferenced or self._ready.keys() & self._resting.keys():
            raise IntegrityError(
                f"prefix cache: got {sorted(self.unreferenced)[:8]} unreferenced, expected {sorted(expected)[:8]}"
            )
        if any(epoch <= self._completed for epoch in self._resting.values()):
            raise IntegrityError(f"prefix cache: pages rest for steps <= {self._completed}, which completed")
