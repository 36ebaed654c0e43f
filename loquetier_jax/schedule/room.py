"""When there will be room for who waits: slots and KV pages as the running requests give them back."""

from collections.abc import Collection

from loquetier_jax.schedule.snapshot import Snapshot, Waiting


class Room:
    """Reservations in the order in which they are made, nobody having to end before his max_tokens.

    Counted are free slots and KV pages, and those of the requests that decode. Not counted, so that a reservation is
    no promise: adapter pages; what requests still in their prompt, those admitted now and those with a reservation
    give back in their turn; who ends early, by a stop or a cancel.

    Attributes:
        slots, pages: What is left at the moment of the last reservation, once that is taken; negative when it can
            never be had from the running requests.
    """

    def __init__(self, snapshot: Snapshot, admit: Collection[str] = ()) -> None:
        """Starts from what is free, less what the waiting requests of `admit` take."""
        taken = [w.pages for w in snapshot.waiting if w.id in admit]
        self.slots, self.pages = snapshot.free_slots - len(taken), snapshot.free_pages - sum(taken)
        self._ending = sorted(((r.remaining, r.pages) for r in snapshot.running), reverse=True)
        self._steps = 0

    def reserve(self, request: Waiting) -> int:
        """Steps until there is room for one more, which it then takes."""
        while self._ending and (self.slots < 1 or self.pages < request.pages):
            self._steps, pages = self._ending.pop()
            self.slots, self.pages = self.slots + 1, self.pages + pages
        self.slots, self.pages = self.slots - 1, self.pages - request.pages
        return self._steps
