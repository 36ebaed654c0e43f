"""Allocation of KV cache pages to requests."""

from collections.abc import Iterable, Sequence

from loquetier_jax.config import require
from loquetier_jax.pool import IdPool

TRASH_PAGE = 0  # padding rows write here; never allocated


class KVPages:
    """Pages of the paged KV cache.

    A request reserves everything it may need at admission, so that it can always finish.

    Args:
        num_pages: Number of pages, including trash page 0; >= 2.
        page_size: Tokens per page.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        require(num_pages >= 2, "num_pages", num_pages, "an integer >= 2 (page 0 is trash)")
        require(page_size >= 1, "page_size", page_size, "an integer >= 1")
        self.page_size = page_size
        self._pool = IdPool(range(TRASH_PAGE + 1, num_pages), "KV pages")

    @property
    def num_pages(self) -> int:
        """Number of allocatable pages: all but the trash page."""
        return self._pool.size

    @property
    def num_free(self) -> int:
        """Number of pages that `reserve` can allocate now, excluding those in quarantine."""
        return self._pool.num_free

    def pages_for(self, num_tokens: int) -> int:
        """Number of pages needed for `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def reserve(self, num_tokens: int) -> tuple[int, ...]:
        """Takes pages for `num_tokens` (prompt + max_tokens), in order of position.

        Raises:
            CapacityError: not enough are free; nothing was changed.
        """
        return self._pool.take(self.pages_for(num_tokens))

    def free(self, pages: Sequence[int], epoch: int) -> None:
        """Returns pages, to be reused once step `epoch` (the last dispatched that may use them, or 0) has completed.

        Raises:
            IntegrityError: a page is not reserved; nothing was changed.
        """
        self._pool.give_back(pages, epoch)

    def complete(self, epoch: int) -> None:
        """Records that all steps up to `epoch` have completed."""
        self._pool.complete(epoch)

    def check_integrity(self, owned: Iterable[Iterable[int]] | None = None) -> None:
        """Checks that every page is in exactly one state.

        Args:
            owned: If given, the page lists of all live requests, which must be exactly the reserved pages.

        Raises:
            IntegrityError: a page is lost or in two states, or `owned` differs from the reserved pages.
        """
        self._pool.check_integrity(None if owned is None else [p for pages in owned for p in pages])
