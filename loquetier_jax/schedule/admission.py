"""Admission: which waiting requests get a slot and KV pages."""

import functools

from loquetier_jax.config import Bucket
from loquetier_jax.schedule.deadlines import Reservations
from loquetier_jax.schedule.types import Snapshot, Waiting

EXAMINED = 64  # number of waiting requests checked for lack of room per decision


@functools.lru_cache(maxsize=256)
def decode_limit(buckets: tuple[Bucket, ...]) -> int:
    """Maximum number of running requests; 0 if no bucket has prefill rows.

    All of them must decode in one step whatever their contexts, also without the buckets of jobs, which end.
    """
    whole = [b for b in buckets if not b.context]
    always = [b for b in whole if not b.packs] or whole
    return max((b.decode for b in always), default=0) if any(b.prefill for b in whole) else 0


class Admission:
    """Tracks the room for waiting requests during one decision.

    A request that does not fit may be overtaken by at most `max_overtakes` later requests; after that they wait behind
    it. If it lacks only adapter pages, which a job may hold for hours, only requests that need adapter pages wait.
    With a TTFT target, a request that lacks a slot or KV pages gets a reservation, and is only overtaken by requests
    that do not delay it (conservative backfilling, as in batch schedulers).

    A request whose adapter is not resident steps back for those whose adapter is, which evict nothing, at most
    `max_overtakes` times as well.

    Attributes:
        admitted: Ids of admitted requests, in order.
    """

    def __init__(self, snapshot: Snapshot, max_overtakes: int) -> None:
        """Starts from the free slots and pages of `snapshot`."""
        self.admitted: list[str] = []
        self._limit = decode_limit(snapshot.buckets)
        self._slots, self._pages, self._taken_pages = snapshot.free_slots, snapshot.free_pages, 0
        self._adapter_pages = snapshot.free_adapter_pages
        self._pinned: set[str] = set()
        self._count = len(snapshot.running) + len(snapshot.prefilling)
        self._rank = {w.id: i for i, w in enumerate(snapshot.waiting)}
        self._max_overtakes = max_overtakes
        self._before = snapshot.fairness.overtaken
        # Requests whose adapter is not resident -> number of times overtaken.
        self._passed = {w.id: self._before.get(w.id, 0) for w in snapshot.waiting[:EXAMINED] if not w.resident}
        # Blocked requests (no room, or overtaken max_overtakes times) -> number of times overtaken.
        self._blocked: dict[str, int] = {}
        self._lack_adapter_pages: set[str] = set()
        self._reservations = Reservations(snapshot) if snapshot.slo.ttft_ms is not None else None
        self._spare: dict[str, list[int]] = {}  # request with a reservation -> [slots, KV pages] that it leaves free
        for request in snapshot.waiting[:EXAMINED]:
            if not self._room(request) or self._before.get(request.id, 0) >= max_overtakes:
                self._block(request)

    def _room(self, request: Waiting) -> bool:
        return self._adapter_room(request) and self._other_room(request)

    def _adapter_room(self, request: Waiting) -> bool:
        return request.adapter in self._pinned or request.adapter_pages <= self._adapter_pages

    def _other_room(self, request: Waiting) -> bool:
        return self._slots > 0 and request.pages <= self._pages and self._count < self._limit

    def _block(self, request: Waiting) -> None:
        if request.id not in self._blocked:
            later = sum(self._rank[i] > self._rank[request.id] for i in self.admitted)
            self._blocked[request.id] = self._before.get(request.id, 0) + later
            if not self._adapter_room(request) and self._other_room(request):
                self._lack_adapter_pages.add(request.id)
            if self._reservations and (self._slots < 1 or self._pages < request.pages):
                self._reservations.reserve(request)
                spare = self._reservations.slots - len(self.admitted), self._reservations.pages - self._taken_pages
                self._spare[request.id] = list(spare)

    def steps_back(self, request: Waiting) -> bool:
        """Whether requests with a resident adapter go before this one."""
        return not request.resident and self._passed.get(request.id, 0) < self._max_overtakes

    def fits(self, request: Waiting) -> bool:
        """Whether the request can be admitted now; if there is no room, marks it as blocked."""
        if not self._room(request):
            self._block(request)
            return False
        rank, wants = self._rank[request.id], request.adapter_pages > 0
        spare = [have for i, have in self._spare.items() if self._rank[i] < rank]
        if any(slots < 1 or pages < request.pages for slots, pages in spare):
            return False
        behind = (i for i, n in self._blocked.items() if n >= self._max_overtakes and self._rank[i] < rank)
        return all(i in self._lack_adapter_pages and not wants for i in behind)

    def take(self, request: Waiting) -> None:
        """Admits a request that fits."""
        self.admitted.append(request.id)
        self._blocked.pop(request.id, None)
        self._passed.pop(request.id, None)
        for have in self._spare.values():
            have[0] -= 1
            have[1] -= request.pages
        self._taken_pages += request.pages
        for counts in (self._blocked, self._passed):
            for i in counts:
                counts[i] += self._rank[i] < self._rank[request.id]
        self._slots -= 1
        self._pages -= request.pages
        self._count += 1
        if request.adapter not in self._pinned:
            self._adapter_pages -= request.adapter_pages
            self._pinned.add(request.adapter)

    def overtaken(self) -> dict[str, int]:
        """Waiting request without room or without a resident adapter -> later requests admitted before it so far."""
        before = {i: n for i, n in self._before.items() if i in self._rank and i not in self.admitted}
        return before | {i: n for i, n in (self._passed | self._blocked).items() if n}
