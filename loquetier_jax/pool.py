"""Integer ids with deferred reuse: pages and slots that dispatched steps may still use after their owner is done."""

from collections import deque
from collections.abc import Hashable, Iterable, Sequence

from loquetier_jax.errors import CapacityError, IntegrityError


class IdPool:
    """Hands out ids; a returned id is reused only once the steps that may touch it have completed.

    An id is free, owned, or in quarantine with an epoch: the number of the last step dispatched while its owner still
    used it. Epochs count from 1; 0 means that no step used it. No jax.

    Args:
        ids: Distinct; initially all free.
        name: Plural noun for the ids, for error messages.

    Attributes:
        completed: The newest epoch known to be complete.
    """

    def __init__(self, ids: Iterable[int], name: str) -> None:
        self.name = name
        self.completed = 0
        self._all = frozenset(ids)
        self._free = deque(sorted(self._all))
        self._owner: dict[int, Hashable] = {}
        self._quarantine: dict[int, list[int]] = {}  # epoch -> ids

    @property
    def size(self) -> int:
        """Number of ids in any state."""
        return len(self._all)

    @property
    def num_free(self) -> int:
        """Number of ids that can be taken now, excluding those in quarantine."""
        return len(self._free)

    @property
    def taken(self) -> frozenset[int]:
        """Ids that have an owner."""
        return frozenset(self._owner)

    def owned_by(self, owner: Hashable) -> set[int]:
        """The ids of one owner."""
        return {i for i, name in self._owner.items() if name == owner}

    def owners(self) -> set[Hashable]:
        """All current owners."""
        return set(self._owner.values())

    def take(self, count: int, owner: Hashable = None) -> tuple[int, ...]:
        """Gives `count` free ids to `owner`, those free longest first.

        Raises:
            CapacityError: fewer are free; nothing is changed.
        """
        if count > len(self._free):
            waiting = sum(map(len, self._quarantine.values()))
            raise CapacityError(
                f"{self.name}: {count} requested, {len(self._free)} free "
                f"({len(self._owner)} taken, {waiting} in quarantine, of {self.size})"
            )
        ids = tuple(self._free.popleft() for _ in range(count))
        self._owner.update(dict.fromkeys(ids, owner))
        return ids

    def transfer(self, ids: Sequence[int], owner: Hashable, to: Hashable) -> None:
        """Transfers ids from `owner` to `to`.

        Raises:
            IntegrityError: `owner` does not own them; nothing is changed.
        """
        self._check_owned(ids, owner)
        self._owner.update(dict.fromkeys(ids, to))

    def give_back(self, ids: Sequence[int], epoch: int, owner: Hashable = None) -> None:
        """Returns ids of `owner`; they become free once step `epoch` has completed.

        Args:
            ids: Distinct ids owned by `owner`.
            epoch: The last step dispatched that may use them, 0 if none.
            owner: Their owner.

        Raises:
            IntegrityError: `owner` does not own them, or one is repeated; nothing is changed.
        """
        self._check_owned(ids, owner)
        for i in ids:
            del self._owner[i]
        if epoch <= self.completed:
            self._free.extend(ids)
        elif ids:
            self._quarantine.setdefault(epoch, []).extend(ids)

    def complete(self, epoch: int) -> None:
        """Records that all steps up to `epoch` have completed on the device; an older epoch changes nothing."""
        self.completed = max(self.completed, epoch)
        for waiting in sorted(e for e in self._quarantine if e <= self.completed):
            self._free.extend(self._quarantine.pop(waiting))

    def check_integrity(self, owned: Iterable[int] | None = None) -> None:
        """Checks that every id is in exactly one state.

        Args:
            owned: If given, the ids that the owners believe they own, which must be exactly those taken.

        Raises:
            IntegrityError: an id is lost or in two states, or `owned` differs from the ids taken.
        """
        quarantined = [i for ids in self._quarantine.values() for i in ids]
        everything = [*self._free, *self._owner, *quarantined]
        if len(everything) != self.size or set(everything) != self._all:
            raise IntegrityError(
                f"{self.name}: got {len(self._free)} free + {len(self._owner)} taken + {len(quarantined)} in "
                f"quarantine ({len(set(everything))} distinct), expected {self.size} distinct in all"
            )
        if any(epoch <= self.completed for epoch in self._quarantine):
            raise IntegrityError(f"{self.name}: ids are in quarantine for steps <= {self.completed}, which completed")
        if owned is not None:
            self._check_owners(list(owned))

    def _check_owners(self, owned: list[int]) -> None:
        if len(owned) != len(set(owned)) or set(owned) != self.taken:
            lost, foreign = sorted(self.taken - set(owned)), sorted(set(owned) - self.taken)
            raise IntegrityError(
                f"{self.name}: got {len(owned)} in use, expected the {len(self._owner)} that are taken, once each; "
                f"taken and not in use {lost[:8]}, in use and not taken {foreign[:8]}"
            )

    def _check_owned(self, ids: Sequence[int], owner: Hashable) -> None:
        wrong = [i for i in ids if i not in self._owner or self._owner[i] != owner]
        if wrong or len(set(ids)) != len(ids):
            of = "" if owner is None else f" of {owner!r}"
            raise IntegrityError(f"{self.name}: got {wrong or list(ids)}, expected distinct ids that are taken{of}")
