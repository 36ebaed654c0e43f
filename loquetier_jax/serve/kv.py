"""Which pages of the KV cache belong to which request."""

from collections.abc import Iterable, Sequence

from loquetier_jax.config import require
from loquetier_jax.pool import IdPool

TRASH_PAGE = 0  # rows without a request write here; never handed out


class KVPages:
    """Pages of the paged KV cache.

    A request reserves all it can ever need at once, so that it always finishes.

    Args:
        num_pages: Pages in all, the trash page 0 included; >= 2.
        page_size: Tokens a page holds.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        require(num_pages >= 2, "num_pages", num_pages, "an integer >= 2 (page 0 is trash)")
        require(page_size >= 1, "page_size", page_size, "an integer >= 1")
        self.page_size = page_size
        self._pool = IdPool(range(TRASH_PAGE + 1, num_pages), "KV pages")

    @property
    def num_pages(self) -> int:
        """Pages that can be handed out: all but the trash page."""
        return self._pool.size

    @property
    def num_free(self) -> int:
        """Pages that `reserve` can hand out now; those in quarantine are not among them."""
        return self._pool.num_free

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens take."""
        return -(-num_tokens // self.page_size)

    def reserve(self, num_tokens: int) -> tuple[int, ...]:
        """Takes the pages of prompt + max_tokens, in order of position.

        Raises:
            CapacityError: not enough are free; none was taken.
        """
        return self._pool.take(self.pages_for(num_tokens))

    def free(self, pages: Sequence[int], epoch: int) -> None:
        """Gives pages back once step `epoch` (the last dispatched that may use them; 0: none) has completed.

        Raises:
            IntegrityError: a page is not reserved; nothing was changed.
        """
        self._pool.give_back(pages, epoch)

    def complete(self, epoch: int) -> None:
        """Says that all steps up to `epoch` have completed."""
        self._pool.complete(epoch)

    def check_integrity(self, owned: Iterable[Iterable[int]] | None = None) -> None:
        """Checks that pages add up.

        Args:
            owned: The page lists of all live requests, if at hand: they must be exactly the reserved pages.

        Raises:
            IntegrityError: a page is lost, in two places, or owned by nobody or twice.
        """
        self._pool.check_integrity(None if owned is None else [p for pages in owned for p in pages])
