"""A pool of numbered things that a dispatched step may still be using when their owner lets go of them."""

from collections import deque
from collections.abc import Iterable

from loquetier_jax.errors import CapacityError, IntegrityError


class EpochPool:
    """Hands out integers; what is given back waits until the steps that may touch it have completed.

    A thing is free, taken, or in quarantine with an epoch: the number of the last step dispatched while its
    owner still used it. `complete(epoch)` says that all steps up to that one are done.
    """

    def __init__(self, items: Iterable[int], name: str) -> None:
        """Makes a pool of distinct `items`, all free; `name` is for messages."""
        self.name = name
        self._all = frozenset(items)
        self._free = deque(sorted(self._all))
        self._taken: set[int] = set()
        self._quarantine: dict[int, list[int]] = {}  # epoch -> items
        self._completed = -1

    @property
    def size(self) -> int:
        """All items, whatever their state."""
        return len(self._all)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_taken(self) -> int:
        return len(self._taken)

    @property
    def num_quarantined(self) -> int:
        return sum(len(items) for items in self._quarantine.values())

    @property
    def taken(self) -> frozenset[int]:
        return frozenset(self._taken)

    def take(self, count: int) -> list[int]:
        """Takes `count` free items, the longest free first.

        Raises:
            CapacityError: fewer are free; none was taken.
        """
        if count > len(self._free):
            raise CapacityError(
                f"{self.name}: got a need of {count}, expected at most {len(self._free)} "
                f"({len(self._taken)} taken, {self.num_quarantined} in quarantine, of {self.size})"
            )
        items = [self._free.popleft() for _ in range(count)]
        self._taken.update(items)
        return items

    def give(self, items: Iterable[int], epoch: int) -> None:
        """Gives items back; they are free once `epoch` has completed.

        Args:
            items: Distinct taken items.
            epoch: The last step dispatched that may use them; -1 when none does.

        Raises:
            IntegrityError: an item is not taken, or is named twice; nothing was changed.
        """
        items = list(items)
        if len(set(items)) != len(items) or not self._taken.issuperset(items):
            wrong = sorted(set(items) - self._taken) or items
            raise IntegrityError(f"{self.name}: got {wrong} back, expected distinct items that are taken")
        self._taken.difference_update(items)
        if epoch <= self._completed:
            self._free.extend(items)
        elif items:
            self._quarantine.setdefault(epoch, []).extend(items)

    def complete(self, epoch: int) -> None:
        """Frees what waited for steps up to `epoch`; an older epoch than before changes nothing."""
        self._completed = max(self._completed, epoch)
        for waiting in sorted(e for e in self._quarantine if e <= self._completed):
            self._free.extend(self._quarantine.pop(waiting))

    def check_integrity(self) -> None:
        """Raises IntegrityError unless every item is in exactly one state."""
        quarantined = [i for items in self._quarantine.values() for i in items]
        everything = [*self._free, *self._taken, *quarantined]
        if len(everything) != self.size or set(everything) != self._all:
            raise IntegrityError(
                f"{self.name}: got {len(self._free)} free + {len(self._taken)} taken + {len(quarantined)} in "
                f"quarantine ({len(set(everything))} distinct), expected {self.size} distinct in all"
            )
        if any(e <= self._completed for e in self._quarantine):
            raise IntegrityError(
                f"{self.name}: got quarantine of step {self._completed} or before: completed"
            )
