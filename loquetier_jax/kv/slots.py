"""Slots: rows of the per-request state on the device."""

from collections.abc import Iterable

from loquetier_jax.config import require
from loquetier_jax.errors import IntegrityError
from loquetier_jax.kv.pool import EpochPool


class Slots:
    """Slots 0 .. num_slots - 1."""

    def __init__(self, num_slots: int) -> None:
        """Makes `num_slots` free slots."""
        require(num_slots >= 1, "num_slots", num_slots, "an integer >= 1")
        self._pool = EpochPool(range(num_slots), "slots")

    @property
    def num_slots(self) -> int:
        return self._pool.size

    @property
    def num_free(self) -> int:
        """Slots that `acquire` can hand out now."""
        return self._pool.num_free

    def acquire(self) -> int:
        """Takes a slot.

        Raises:
            CapacityError: none is free.
        """
        return self._pool.take(1)[0]

    def release(self, slot: int, epoch: int) -> None:
        """Gives the slot back once step `epoch` has completed.

        Raises:
            IntegrityError: the slot is not acquired.
        """
        self._pool.give([slot], epoch)

    def complete(self, epoch: int) -> None:
        """Says that all steps up to `epoch` have completed."""
        self._pool.complete(epoch)

    def check_integrity(self, owned: Iterable[int] | None = None) -> None:
        """Raises IntegrityError unless slots add up and, if given, `owned` are exactly the acquired ones."""
        self._pool.check_integrity()
        if owned is None:
            return
        slots = list(owned)
        if len(slots) != len(set(slots)) or set(slots) != self._pool.taken:
            taken = sorted(self._pool.taken)
            raise IntegrityError(f"slots: got {sorted(slots)} owned, expected {taken}, each once")
