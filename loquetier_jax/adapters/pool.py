"""Who has which page: free, owned, or waiting for the last step that used it. Numbers only; no jax."""

from collections.abc import Hashable, Sequence

from loquetier_jax.errors import CapacityError, IntegrityError


class PagePool:
    """Page ids 1 .. num_pages-1 (page 0 is the page of zeros), each in exactly one place.

    An epoch is the number of a step. Pages given back at epoch e may still be read by step e on the device,
    so they wait until `complete(e)`.

    Attributes:
        completed: The newest epoch known to be complete.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise IntegrityError(f"num_pages: got {num_pages}, expected at least 2 (page 0 is never taken)")
        self.num_pages = num_pages
        self.completed = 0
        self._free = list(range(num_pages - 1, 0, -1))
        self._waiting: dict[int, int] = {}
        self._owner: dict[int, Hashable] = {}

    @property
    def num_free(self) -> int:
        """Pages that can be taken now."""
        return len(self._free)

    def owned_by(self, owner: Hashable) -> set[int]:
        """The pages that `owner` has."""
        return {page for page, who in self._owner.items() if who == owner}

    def owners(self) -> set[Hashable]:
        """Everybody who has a page."""
        return set(self._owner.values())

    def take(self, count: int, owner: Hashable) -> tuple[int, ...]:
        """Gives `count` free pages to `owner`.

        Raises:
            CapacityError: fewer are free; nothing is changed.
        """
        if count > len(self._free):
            raise CapacityError(f"adapter pages: {count} asked for, {len(self._free)} are free")
        pages = tuple(self._free.pop() for _ in range(count))
        self._owner.update(dict.fromkeys(pages, owner))
        return pages

    def transfer(self, pages: Sequence[int], owner: Hashable, to: Hashable) -> None:
        """Makes `to` the owner of pages of `owner`.

        Raises:
            IntegrityError: `owner` does not have them; nothing is changed.
        """
        self._check_owned(pages, owner)
        self._owner.update(dict.fromkeys(pages, to))

    def give_back(self, pages: Sequence[int], owner: Hashable, epoch: int) -> None:
        """Takes pages from `owner`; free at once when `epoch` is complete, else when it is.

        Args:
            pages: Pages of `owner`.
            owner: Who has them.
            epoch: The last step dispatched with them, 0 when there was none.

        Raises:
            IntegrityError: `owner` does not have them; nothing is changed.
        """
        self._check_owned(pages, owner)
        for page in pages:
            del self._owner[page]
            if epoch <= self.completed:
                self._free.append(page)
            else:
                self._waiting[page] = epoch

    def complete(self, epoch: int) -> None:
        """Step `epoch`, and with it all before it, has completed on the device."""
        self.completed = max(self.completed, epoch)
        for page in [page for page, last in self._waiting.items() if last <= self.completed]:
            del self._waiting[page]
            self._free.append(page)

    def check_integrity(self) -> None:
        """Raises IntegrityError unless every page is in exactly one place."""
        places = [*self._free, *self._waiting, *self._owner]
        if sorted(places) != list(range(1, self.num_pages)):
            odd = sorted(p for p in set(places) | set(range(1, self.num_pages)) if places.count(p) != 1)
            raise IntegrityError(f"adapter pages {odd} are lost or in several places at once")
        late = [page for page, epoch in self._waiting.items() if epoch <= self.completed]
        if late:
            raise IntegrityError(f"adapter pages {late} still wait for steps that have completed")

    def _check_owned(self, pages: Sequence[int], owner: Hashable) -> None:
        strange = [page for page in pages if page not in self._owner or self._owner[page] != owner]
        if strange or len(set(pages)) != len(pages):
            raise IntegrityError(f"adapter pages {list(pages)} are not (all, once) those of {owner!r}")
