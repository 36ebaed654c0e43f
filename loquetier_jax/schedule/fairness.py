"""Fair queueing: serves the least served name first."""

from collections.abc import Iterable, Mapping, Sequence

from loquetier_jax.schedule.types import JobView


class FairShare:
    """Service received per name, relative to the least served active name.

    Deficit round robin in the form of start-time fair queueing: the least served name goes first and is charged for
    what it gets. A name that returns after a pause starts level with the least served one (no credit for the time
    away), but keeps any lead it still has.
    """

    def __init__(self, served: Mapping[str, float], active: Iterable[str]) -> None:
        """Continues from the `state()` of an earlier FairShare; `active` are the names that want service now."""
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
        """Service that an active name has received beyond the least served active one."""
        return self.served[name] - min(self.served[n] for n in self._order)

    def first(self, names: Iterable[str]) -> str:
        """The least served of `names`; among equals, the first in the constructor's order."""
        return min(names, key=lambda n: (self.served[n], self._order[n]))

    def charge(self, name: str, amount: float) -> None:
        """Adds to the service received by `name`."""
        self.served[name] += amount

    def state(self) -> dict[str, float]:
        """The state from which the next FairShare continues."""
        return dict(self.served)


def pack_order(jobs: Sequence[JobView], share: FairShare, limit: int, max_lead: int) -> list[str]:
    """The job names of the next packs of one training pass, in fair order; charges nothing.

    Args:
        jobs: Ready jobs that can share a pass.
        share: Packs served, over all jobs that want service.
        limit: Maximum number of packs.
        max_lead: Maximum packs that a job may be ahead of the least served one.
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
