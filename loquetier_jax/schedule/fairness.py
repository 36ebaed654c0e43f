"""Fair queueing: who has been served least, among those who want something."""

from collections.abc import Iterable, Mapping, Sequence

from loquetier_jax.schedule.types import JobView


class FairShare:
    """Service received per name, relative to the least served name that wants service.

    Deficit round robin in the form of start-time fair queueing: the least served goes first and is charged
    for what it gets. Who comes back after a pause starts level with the least served (no credit for the time
    away) but keeps what it is still ahead.
    """

    def __init__(self, served: Mapping[str, float], active: Iterable[str]) -> None:
        """Starts from the `served` of an earlier FairShare; `active` are the names that want service now."""
        self._order = {name: i for i, name in enumerate(dict.fromkeys(active))}
        known = [served[name] for name in self._order if name in served]
        floor = min(known, default=0.0)
        self.served = {name: value - floor for name, value in served.items() if value > floor}
        for name in self._order:
            self.served.setdefault(name, 0.0)

    def copy(self) -> "FairShare":
        """An independent copy."""
        return FairShare(self.served, self._order)

    def lead(self, name: str) -> float:
        """What an active name has received more than the least served active one."""
        return self.served[name] - min(self.served[n] for n in self._order)

    def first(self, names: Iterable[str]) -> str:
        """The least served of `names`; of equals the first in the order given to the constructor."""
        return min(names, key=lambda n: (self.served[n], self._order[n]))

    def charge(self, name: str, amount: float) -> None:
        """Adds to what `name` has received."""
        self.served[name] += amount

    def state(self) -> dict[str, float]:
        """What the next FairShare starts from."""
        return dict(self.served)


def pack_order(jobs: Sequence[JobView], share: FairShare, limit: int, max_lead: int) -> list[str]:
    """The next packs of one training pass, by job name, in fair order; charges nothing.

    Args:
        jobs: Ready jobs that may ride together.
        share: Counted in packs, over all jobs that want service.
        limit: Most packs.
        max_lead: Most packs a job may be ahead of the least served one.
    """
    share = share.copy()
    left = {job.name: job.packs for job in jobs}
    order: list[str] = []
    while len(order) < limit:
        names = [n for n, packs in left.items() if packs and share.lead(n) < max_lead]
        if not names:
            break
        name = share.first(names)
        share.charge(name, 1)
        left[name] -= 1
        order.append(name)
    return order
