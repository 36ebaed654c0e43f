"""Live requests, from arrival to end: their device resources, the rows they need and the tokens they receive."""

import itertools
import math
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from loquetier_jax.adapters.store import AdapterStore
from loquetier_jax.adapters.version import Version
from loquetier_jax.batch.pack import StepItems
from loquetier_jax.errors import AdapterError, CapacityError
from loquetier_jax.pool import IdPool
from loquetier_jax.schedule.types import Waiting
from loquetier_jax.serve import views
from loquetier_jax.serve.kv import KVPages
from loquetier_jax.serve.listeners import Listener, Listeners
from loquetier_jax.serve.live import LiveRequests
from loquetier_jax.serve.nan import why_nan
from loquetier_jax.serve.request import Request

LOOKAHEAD = 256  # maximum waiting requests considered per scheduling decision

SampledRows = list[tuple[int, Request]]
"""(row of a step's sampled tokens, the request it belongs to)."""


class RequestQueue:
    """The waiting and running requests and the resources they own.

    Args:
        store: Adapter versions; a request keeps the version that was current at its arrival.
        kv, slots: Reserved at admission, returned with the epoch of the last step dispatched.
    """

    def __init__(self, store: AdapterStore, kv: KVPages, slots: IdPool) -> None:
        self.store, self.kv, self.slots = store, kv, slots
        self.waiting: dict[str, Request] = {}
        self.running: dict[str, Request] = {}
        self.listeners = Listeners()
        self._versions: dict[str, Version] = {}  # request id -> version, held while waiting, acquired while running
        self._live = LiveRequests()
        self._ended: str | None = None  # why no request can run any more
        self._forgotten: deque[int] = deque()  # ids of versions that nobody can ask for any more
        store.on_forget = self._forgotten.append

    def announce(self, requests: Sequence[Request]) -> None:
        """Registers the completions of one prompt: reserves their ids and holds their adapter version.

        Thread-safe, without the loop's lock; `add` queues them afterwards.

        Raises:
            RequestError: an id is in use.
            AdapterError: an unknown adapter. In both cases nothing is changed.
        """
        with self._live.lock:
            self._live.check_free(requests)
            if (adapter := requests[0].adapter) is not None:
                version = self.store.hold(adapter, len(requests))
                for request in requests:
                    self._versions[request.id], request.version = version, version.id
            self._live.add(requests)

    def prepare(self, requests: Sequence[Request]) -> None:
        """Does for announced requests what takes long, so that the loop need not. Thread-safe.

        Makes the keys of their prompts in the prefix cache; begins to load their adapter, without waiting for it. If it
        cannot be read, the requests end with that error at admission.
        """
        for request in requests:
            scope, reads = (request.version, request.cache_salt), request.params.prompt_logprobs is None
            request.prefix = self.kv.prefix(request.prompt_ids, scope, reads=reads)
        version = self._versions.get(requests[0].id)
        if version is not None:
            self.store.prepare(version)

    def withdraw(self, requests: Sequence[Request]) -> None:
        """Undoes `announce` for requests that will not be queued. Thread-safe."""
        for request in requests:
            self._live.end(request)
            self._drop(request)

    def add(self, request: Request, listener: Listener | None = None) -> None:
        """Queues an announced request; `listener` is called with every StreamPiece."""
        if request.finished:  # cancelled before the loop has seen it
            return
        if listener is not None:
            self.listeners[request.id] = listener
        if self._ended is None:
            self.waiting[request.id] = request
            return
        self._leave_queue(request)
        self.listeners.tell(request, request.fail(self._ended, request.metrics.arrival_time))

    def is_live(self, name: str) -> bool:
        """Whether a live request or completion has this id. Thread-safe."""
        return name in self._live

    def completions(self, request_id: str) -> list[Request]:
        """The live completions of a request. Thread-safe."""
        return self._live.completions(request_id)

    def admit(self, request: Request, now: float, epoch: int) -> bool:
        """Gives a waiting request all the resources it needs to finish.

        Args:
            request: A waiting request.
            now: Current time in seconds, for its metrics.
            epoch: The last step dispatched.

        Returns:
            False if there is no room, or its adapter has to be loaded first (nothing is changed), or its adapter cannot
            be read (the request has ended with an error).
        """
        try:
            slot, kv_pages = self._acquire(request, epoch)
        except CapacityError:
            return False
        except AdapterError as error:
            self._leave_queue(request)
            self.listeners.tell(request, request.fail(str(error), now))
            return False
        del self.waiting[request.id]
        request.slot, request.kv_pages = slot, kv_pages
        request.num_prefilled = request.metrics.num_cached_tokens = self.kv.shared_tokens(request.prefix)
        request.metrics.first_scheduled_time = now
        request.status = "running"
        self.running[request.id] = request
        return True

    def _acquire(self, request: Request, epoch: int) -> tuple[int, tuple[int, ...]]:
        """Slot and KV pages; the adapter comes last because only that can fail for reasons other than capacity."""
        kv_pages = self.kv.reserve(request.num_tokens, request.prefix)
        try:
            slot = self.slots.take(1)[0]
        except CapacityError:
            self.kv.free(kv_pages, 0)
            raise
        version = self._versions.get(request.id)
        if version is not None:
            self.store.acquire(version)
            try:
                request.adapter_pages = self.store.ensure_loaded(version)
            except (CapacityError, AdapterError):
                self.store.release(version, epoch)
                self.kv.free(kv_pages, 0)
                self.slots.give_back([slot], 0)
                raise
            self.store.drop(version)
        return slot, kv_pages

    def _leave_queue(self, request: Request) -> None:
        self.waiting.pop(request.id, None)
        self._live.end(request)
        self._drop(request)

    def _drop(self, request: Request) -> None:
        if (version := self._versions.pop(request.id, None)) is not None:
            self.store.drop(version)

    def version(self, request: Request) -> Version | None:
        """The adapter version of a live request; None for the base."""
        return self._versions.get(request.id)

    def items(self, decode: Collection[str], prefill: Sequence[tuple[str, int]]) -> StepItems[Request]:
        """Inference rows of a decision: `decode` get their next token, `prefill` so many tokens of their prompts."""
        return StepItems(
            prefill=[(self.running[name], count) for name, count in prefill],
            decode=[r for r in self.decoding() if r.id in decode],
        )

    def decoding(self) -> list[Request]:
        """Running requests past their prefill that may still produce tokens."""
        return [r for r in self.running.values() if 0 < r.num_dispatched < r.params.max_tokens]

    def views(self, expected: float) -> dict[str, Any]:
        """The request-related fields of a scheduler Snapshot; tokens in flight count as read at time `expected`."""
        unfinished = (r for r in self.running.values() if r.num_remaining > 0)
        return {
            "running": tuple(views.decoding(r, expected, self.kv) for r in self.decoding()),
            "prefilling": tuple(map(views.prefilling, unfinished)),
            "waiting": tuple(itertools.islice(self._waiting_views(), LOOKAHEAD)),
            "free_slots": self.slots.num_free,
            "free_pages": self.kv.num_free,
            "free_adapter_pages": self.store.num_reclaimable(),
        }

    def _waiting_views(self) -> Iterator[Waiting]:
        for request in views.ready(self.waiting.values(), self._versions, self.store):
            view = views.waiting(request, self._versions.get(request.id), self.kv)
            first = request if request.index == 0 else self._live.completions(request.request_id)[0]
            if not views.awaits_sibling(request, first):
                yield view

    def sent(self, items: StepItems[Request], rows: SampledRows) -> None:
        """Records that `items` were dispatched, with `rows` as returned by `pack_step`."""
        for request, count in items.prefill:
            request.num_prefilled += count
        for _, request in rows:
            request.num_dispatched += 1

    def accept(
        self, rows: SampledRows, sampled: dict[str, np.ndarray], now: float, epoch: int
    ) -> None:
        """Delivers sampled tokens to their requests; requests that end return their resources.

        Args:
            rows: As returned by `pack_step`.
            sampled: Numpy arrays: tokens, logprob and, if any request needs them, top_ids, top_logp, rank.
            now: Current time in seconds.
            epoch: The last step dispatched.
        """
        tokens, logprobs = sampled["tokens"].tolist(), sampled["logprob"].tolist()
        for i, request in rows:
            if request.finished:
                continue
            alternatives = rank = None
            if "top_ids" in sampled and request.params.logprobs:  # the bucket's level may exceed the request's
                alternatives = list(
                    zip(sampled["top_ids"][i].tolist(), sampled["top_logp"][i].tolist(), strict=True)
                )
                rank = int(sampled["rank"][i])
            token, logprob = tokens[i], logprobs[i]
            if math.isnan(logprob):  # confined to this row: its adapter or its KV cache
                piece = request.fail(why_nan(self.store, self._versions.get(request.id)), now)
                self.kv.drop(request.kv_pages)
            else:
                piece = request.accept(token, logprob, alternatives, now, rank=rank)
                self.kv.enter(request.prefix, request.kv_pages, request.prompt_ids, request.output_ids)
            if request.finished:
                self._release(request, epoch)
            self.listeners.tell(request, piece)

    def cancel(self, request: Request, now: float, epoch: int) -> None:
        """Aborts a request unless it has already ended."""
        if request.finished:
            return
        piece = request.abort(now)
        if request.id in self.running:
            self._release(request, epoch)
        else:
            self._leave_queue(request)
        self.listeners.tell(request, piece)

    def _release(self, request: Request, epoch: int) -> None:
        del self.running[request.id]
        self._live.end(request)
        self.kv.free(request.kv_pages, epoch)
        self.slots.give_back([request.slot], epoch)
        request.adapter_pages, request.prefix = (), None  # callers keep requests, not what they have read
        if (version := self._versions.pop(request.id, None)) is not None:
            self.store.release(version, epoch)

    def fail_all(self, message: str, now: float) -> None:
        """Ends every request, later ones too, with an error; resources stay taken: the engine has failed."""
        self._ended = message
        for request in [*self.waiting.values(), *self.running.values()]:
            self.listeners.tell(request, request.fail(message, now))

    def end_all(self, message: str, now: float) -> None:
        """Ends every live request with an error and drops it: the engine is being closed."""
        self.fail_all(message, now)
        for kept in (self.waiting, self.running, self._live):
            kept.clear()

    def complete(self, epoch: int) -> None:
        """Lets the resources of all steps up to `epoch` be reused: they have completed."""
        self.kv.complete(epoch)
        self.slots.complete(epoch)
        self.store.complete(epoch)
        while self._forgotten:
            self.kv.drop_version(self._forgotten.popleft())

    def check_integrity(self) -> None:
        """Raises IntegrityError unless pages, slots and adapters are consistent with the live requests."""
        live = self.running.values()
        self.kv.check_integrity([r.kv_pages for r in live])
        self.slots.check_integrity([r.slot for r in live])
        self.store.check_integrity()
