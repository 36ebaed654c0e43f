"""Requests between arrival and end: what they hold on the device, the rows they need, the tokens they get."""

import itertools
import logging
import math
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from loquetier_jax.adapters.store import AdapterStore
from loquetier_jax.adapters.version import Version
from loquetier_jax.batch.pack import StepItems
from loquetier_jax.errors import AdapterError, CapacityError
from loquetier_jax.pool import IdPool
from loquetier_jax.sampling_params import refuse
from loquetier_jax.serve import views
from loquetier_jax.serve.kv import KVPages
from loquetier_jax.serve.nan import why_nan
from loquetier_jax.serve.output import StreamPiece
from loquetier_jax.serve.request import Request

log = logging.getLogger(__name__)

LOOKAHEAD = 256  # waiting requests shown to one decision

Listener = Callable[[StreamPiece], None]


SampledRows = list[tuple[int, Request]]
"""(row of a step's sampled tokens, whose it is)."""


class RequestQueue:
    """Holds the waiting and running requests and everything they own.

    Args:
        store: Adapter versions; a request keeps the one its name meant at arrival to its end.
        kv, slots: Reserved at admission, given back with the epoch of the last step dispatched.
    """

    def __init__(self, store: AdapterStore, kv: KVPages, slots: IdPool) -> None:
        self.store, self.kv, self.slots = store, kv, slots
        self.waiting: dict[str, Request] = {}
        self.running: dict[str, Request] = {}
        self.listeners: dict[str, Listener] = {}
        self._versions: dict[str, Version] = {}  # request id -> held while it waits, acquired while it runs
        self._live: dict[str, list[Request]] = {}  # request_id -> its completions that have not ended
        self._live_ids: set[str] = set()  # of every completion
        self._names = threading.Lock()  # of these two, which other threads ask

    def announce(self, requests: Sequence[Request]) -> None:
        """Takes the completions of one prompt in: their ids are in use, the version of their adapter stays.

        In any thread, without the loop's lock; `add` queues them then.

        Raises:
            RequestError: an id is in use.
            AdapterError: an unknown adapter. In both cases nothing has changed.
        """
        first = requests[0]
        with self._names:
            free = first.request_id not in self._live and not any(r.id in self._live_ids for r in requests)
            free = free and first.request_id not in self._live_ids
            refuse(free, "request_id", first.request_id, "an id that no live request has")
            if first.adapter is not None:
                version = self.store.hold(first.adapter, len(requests))
                for request in requests:
                    self._versions[request.id], request.version = version, version.id
            self._live[first.request_id] = list(requests)
            self._live_ids.update(r.id for r in requests)

    def prepare(self, requests: Sequence[Request]) -> None:
        """Reads and casts the adapter of requests that were announced, where the loop would have to. In any thread.

        What cannot be read ends the requests when they are admitted, as it does where it is found out only then.
        """
        version = self._versions.get(requests[0].id)
        if version is not None:
            with suppress(AdapterError):
                self.store.prepare(version)

    def withdraw(self, requests: Sequence[Request]) -> None:
        """Undoes `announce` of requests that are not queued after all. In any thread."""
        for request in requests:
            self._end(request)
            self._drop(request)

    def add(self, request: Request, listener: Listener | None = None) -> None:
        """Queues a request that was announced; `listener` is called with every StreamPiece."""
        self.waiting[request.id] = request
        if listener is not None:
            self.listeners[request.id] = listener

    def is_live(self, name: str) -> bool:
        """Whether a request that has not ended has this id, or shares it with other completions. In any thread."""
        with self._names:
            return name in self._live_ids or name in self._live

    def completions(self, request_id: str) -> list[Request]:
        """Those of a request that have not ended. In any thread."""
        with self._names:
            return list(self._live.get(request_id, ()))

    def admit(self, request: Request, now: float, epoch: int) -> bool:
        """Gives a waiting request all it needs to finish.

        Args:
            request: Waiting.
            now: Seconds, for its metrics.
            epoch: The last step dispatched.

        Returns:
            False when there is no room (nothing has changed) or its adapter cannot be read (the request has ended
            with an error).
        """
        try:
            slot, kv_pages = self._acquire(request, epoch)
        except CapacityError:
            return False
        except AdapterError as error:
            self._leave_queue(request)
            self._tell(request, request.fail(str(error), now))
            return False
        del self.waiting[request.id]
        request.slot, request.kv_pages = slot, kv_pages
        request.metrics.first_scheduled_time = now
        request.status = "running"
        self.running[request.id] = request
        return True

    def _acquire(self, request: Request, epoch: int) -> tuple[int, tuple[int, ...]]:
        """Slot and KV pages; the adapter last, because only that can fail for other reasons."""
        kv_pages = self.kv.reserve(request.num_tokens)
        try:
            slot = self.slots.take(1)[0]
        except CapacityError:
            self.kv.free(kv_pages, 0)
            raise
        version = self._versions.get(request.id)
        if version is not None:
            self.store.acquire(version)
            try:
                request.adapter_pages = self.store.ensure_resident(version)
            except (CapacityError, AdapterError):
                self.store.release(version, epoch)
                self.kv.free(kv_pages, 0)
                self.slots.give_back([slot], 0)
                raise
            self.store.drop(version)
        return slot, kv_pages

    def _leave_queue(self, request: Request) -> None:
        del self.waiting[request.id]
        self._end(request)
        self._drop(request)

    def _drop(self, request: Request) -> None:
        version = self._versions.pop(request.id, None)
        if version is not None:
            self.store.drop(version)

    def _end(self, request: Request) -> None:
        with self._names:
            self._live_ids.discard(request.id)
            live = self._live[request.request_id]
            live.remove(request)
            if not live:
                del self._live[request.request_id]

    def version(self, request: Request) -> Version | None:
        """The adapter version of a live request, None for the base."""
        return self._versions.get(request.id)

    def items(self, decode: Collection[str], prefill: Sequence[tuple[str, int]]) -> StepItems[Request]:
        """The inference rows of a decision.

        Args:
            decode: Ids of running requests that get their next token.
            prefill: (id, tokens of its prompt) of running requests.
        """
        return StepItems(
            prefill=[(self.running[name], count) for name, count in prefill],
            decode=[r for r in self.decoding() if r.id in decode],
        )

    def decoding(self) -> list[Request]:
        """Running requests that have begun to produce and may produce another token."""
        return [r for r in self.running.values() if 0 < r.num_dispatched < r.params.max_tokens]

    def views(self, expected: float) -> dict[str, Any]:
        """What a decision depends on, the fields of a scheduler's Snapshot; a token in flight is `expected` then."""
        shown = itertools.islice(self.waiting.values(), LOOKAHEAD)
        unfinished = (r for r in self.running.values() if r.num_remaining > 0)
        return {
            "running": tuple(views.decoding(r, expected) for r in self.decoding()),
            "prefilling": tuple(map(views.prefilling, unfinished)),
            "waiting": tuple(
                views.waiting(r, self._versions.get(r.id), self.kv.pages_for(r.num_tokens)) for r in shown
            ),
            "free_slots": self.slots.num_free,
            "free_pages": self.kv.num_free,
            "free_adapter_pages": self.store.num_reclaimable(),
        }

    def sent(self, items: StepItems[Request], rows: SampledRows) -> None:
        """Counts what was dispatched: `rows` as `pack_step` returned them for `items`."""
        for request, count in items.prefill:
            request.num_prefilled += count
        for _, request in rows:
            request.num_dispatched += 1

    def accept(
        self, rows: SampledRows, sampled: dict[str, np.ndarray], now: float, epoch: int
    ) -> None:
        """Hands read tokens to their requests; those that end give everything back.

        Args:
            rows: As `pack_step` returned them.
            sampled: tokens, logprob and, where somebody asked for them, top_ids, top_logp, rank; numpy.
            now: Seconds.
            epoch: The last step dispatched.
        """
        for i, request in rows:
            if request.finished:
                continue
            alternatives = rank = None
            if "top_ids" in sampled and request.params.logprobs:  # not by what its neighbours asked for
                alternatives = list(
                    zip(sampled["top_ids"][i].tolist(), sampled["top_logp"][i].tolist(), strict=True)
                )
                rank = int(sampled["rank"][i])
            token, logprob = int(sampled["tokens"][i]), float(sampled["logprob"][i])
            if math.isnan(logprob):  # of this row alone: its adapter, or its own cache
                piece = request.fail(why_nan(self.store, self._versions.get(request.id)), now)
            else:
                piece = request.accept(token, logprob, alternatives, now, rank=rank)
            if request.finished:
                self._release(request, epoch)
            self._tell(request, piece)

    def cancel(self, request: Request, now: float, epoch: int) -> None:
        """Ends a request at once, unless it has ended."""
        if request.finished:
            return
        piece = request.abort(now)
        if request.id in self.running:
            self._release(request, epoch)
        else:
            self._leave_queue(request)
        self._tell(request, piece)

    def _release(self, request: Request, epoch: int) -> None:
        del self.running[request.id]
        self._end(request)
        self.kv.free(request.kv_pages, epoch)
        self.slots.give_back([request.slot], epoch)
        request.adapter_pages = ()
        version = self._versions.pop(request.id, None)
        if version is not None:
            self.store.release(version, epoch)

    def _tell(self, request: Request, piece: StreamPiece | None) -> None:
        listener = self.listeners.get(request.id)
        if listener is not None and piece is not None:
            try:
                listener(piece)
            except Exception:  # the caller's code; the other requests of this step must get their tokens
                log.exception("the listener of request %s failed and is not called again", request.id)
                del self.listeners[request.id]
        if request.finished:
            self.listeners.pop(request.id, None)

    def fail_all(self, message: str, now: float) -> None:
        """Ends every live request with an error. Nothing is given back: the engine is lost."""
        for request in [*self.waiting.values(), *self.running.values()]:
            self._tell(request, request.fail(message, now))

    def end_all(self, message: str, now: float) -> None:
        """Ends every live request with an error and forgets them: the engine is closed."""
        self.fail_all(message, now)
        for kept in (self.waiting, self.running, self._live, self._live_ids):
            kept.clear()

    def complete(self, epoch: int) -> None:
        """Steps up to `epoch` have completed: what they used may be handed out again."""
        self.kv.complete(epoch)
        self.slots.complete(epoch)
        self.store.complete(epoch)

    def check_integrity(self) -> None:
        """Raises IntegrityError unless pages and slots add up over all live requests."""
        live = self.running.values()
        self.kv.check_integrity([r.kv_pages for r in live])
        self.slots.check_integrity([r.slot for r in live])
        self.store.check_integrity()
