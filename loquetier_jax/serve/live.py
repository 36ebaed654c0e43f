"""The ids of live requests. Thread-safe: callers read them while the loop ends requests."""

import threading
from collections.abc import Sequence

from loquetier_jax.sampling_params import refuse
from loquetier_jax.serve.request import Request


class LiveRequests:
    """Live completions by the id of their request.

    Attributes:
        lock: Guards them; held by a caller that checks and adds in one go.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._live: dict[str, list[Request]] = {}  # request_id -> its live completions
        self._ids: set[str] = set()  # ids of all live completions

    def check_free(self, requests: Sequence[Request]) -> None:
        """Raises RequestError if an id of the completions of one prompt is in use."""
        first = requests[0]
        names = (first.request_id, *(r.id for r in requests))
        with self.lock:
            free = not any(name in self for name in names)
        refuse(free, "request_id", first.request_id, "an id not used by a live request")

    def add(self, requests: Sequence[Request]) -> None:
        """Adds the completions of one prompt."""
        with self.lock:
            self._live[requests[0].request_id] = list(requests)
            self._ids.update(r.id for r in requests)

    def end(self, request: Request) -> None:
        """Removes a completion; one that has gone already is ignored."""
        with self.lock:
            self._ids.discard(request.id)
            live = self._live.get(request.request_id, [])
            if request in live:
                live.remove(request)
            if not live:
                self._live.pop(request.request_id, None)

    def __contains__(self, name: object) -> bool:
        """Whether a live request or completion has this id."""
        with self.lock:
            return name in self._ids or name in self._live

    def completions(self, request_id: str) -> list[Request]:
        """The live completions of a request, by index."""
        with self.lock:
            return list(self._live.get(request_id, ()))

    def clear(self) -> None:
        """Removes all."""
        with self.lock:
            self._live.clear()
            self._ids.clear()
