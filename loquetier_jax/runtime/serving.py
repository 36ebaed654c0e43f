"""Requests between arrival and end: what they hold on the device, the rows they need, the tokens they get."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from loquetier_jax.adapters.store import AdapterStore
from loquetier_jax.adapters.version import Version
from loquetier_jax.batch.pack import ChunkItem, DecodeItem, ServedItem, StepItems
from loquetier_jax.config import Bucket
from loquetier_jax.errors import AdapterError, CapacityError
from loquetier_jax.kv.pages import KVPages
from loquetier_jax.kv.slots import Slots
from loquetier_jax.serve.output import StreamPiece
from loquetier_jax.serve.request import Request

log = logging.getLogger(__name__)

Listener = Callable[[StreamPiece], None]


@dataclass(frozen=True)
class SampledRow:
    """Row `row` of a step's sampled tokens belongs to `request`."""

    row: int
    request: Request


class Serving:
    """Holds the waiting and running requests and everything they own.

    Args:
        store: Adapter versions; a request keeps the one its name meant at arrival to its end.
        kv, slots: Reserved at admission, given back with the epoch of the last step dispatched.
    """

    def __init__(self, store: AdapterStore, kv: KVPages, slots: Slots) -> None:
        self.store, self.kv, self.slots = store, kv, slots
        self.waiting: dict[str, Request] = {}
        self.running: dict[str, Request] = {}
        self.listeners: dict[str, Listener] = {}
        self._live: dict[str, list[str]] = {}  # request_id -> ids of its completions that have not ended
        self._versions: dict[str, Version] = {}  # request id -> held while it waits, acquired while it runs
        self._pages: dict[str, tuple[int, ...]] = {}  # request id -> its adapter pages

    def add(self, request: Request, listener: Listener | None = None) -> None:
        """Queues a request; `listener` is called with every StreamPiece.

        Raises:
            AdapterError: its adapter is unknown; nothing is queued.
        """
        if request.adapter is not None:
            version = self._versions[request.id] = self.store.hold(request.adapter)
            request.version = version.id
        self.waiting[request.id] = request
        self._live.setdefault(request.request_id, []).append(request.id)
        if listener is not None:
            self.listeners[request.id] = listener

    def is_live(self, name: str) -> bool:
        """Whether a request that has not ended has this id, or shares it with other completions."""
        return name in self.waiting or name in self.running or name in self._live

    def completions(self, request_id: str) -> list[Request]:
        """Those of a request that have not ended."""
        return [self.waiting.get(i) or self.running[i] for i in self._live.get(request_id, ())]

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

    def _acquire(self, request: Request, epoch: int) -> tuple[int, list[int]]:
        """Slot and KV pages; the adapter last, because only that can fail for other reasons."""
        kv_pages = self.kv.reserve(request.num_tokens)
        try:
            slot = self.slots.acquire()
        except CapacityError:
            self.kv.free(kv_pages, -1)
            raise
        version = self._versions.get(request.id)
        if version is not None:
            self.store.acquire(version)
            try:
                self._pages[request.id] = self.store.ensure_resident(version)
            except (CapacityError, AdapterError):
                self.store.release(version, epoch)
                self.kv.free(kv_pages, -1)
                self.slots.release(slot, -1)
                raise
            self.store.drop(version)
        return slot, kv_pages

    def _leave_queue(self, request: Request) -> None:
        del self.waiting[request.id]
        self._end(request)
        version = self._versions.pop(request.id, None)
        if version is not None:
            self.store.drop(version)

    def _end(self, request: Request) -> None:
        self._live[request.request_id].remove(request.id)
        if not self._live[request.request_id]:
            del self._live[request.request_id]

    def adapter_pages(self, request: Request) -> tuple[int, ...]:
        """Pages of the version a running request holds; () for the base."""
        return self._pages.get(request.id, ())

    def chunk(self, request: Request, count: int) -> ChunkItem:
        """The next `count` tokens of a running request's prompt."""
        start = request.num_prefilled
        tokens = np.asarray(request.prompt_ids[start : start + count], np.int32)
        return ChunkItem(self._served(request), tokens, start, start + count == len(request.prompt_ids))

    def version(self, request: Request) -> Version | None:
        """The adapter version of a live request, None for the base."""
        return self._versions.get(request.id)

    def decode_items(self) -> list[tuple[str, DecodeItem]]:
        """(request id, row) of every running request that has begun to produce and may produce another token."""
        return [
            (r.id, DecodeItem(self._served(r), len(r.prompt_ids) + r.num_dispatched - 1))
            for r in self.running.values()
            if 0 < r.num_dispatched < r.params.max_tokens
        ]

    def _served(self, request: Request) -> ServedItem:
        return ServedItem(
            slot=request.slot,
            pages=self.adapter_pages(request),
            kv_pages=request.kv_pages,
            params=request.params,
            seed=request.seed,
            index=request.num_dispatched,
            stop_ids=request.stop_ids,
        )

    def sent(self, items: StepItems, bucket: Bucket) -> list[SampledRow]:
        """Counts what was dispatched and says which sampled row belongs to whom. Call after `pack_step`."""
        by_slot = {r.slot: r for r in self.running.values()}
        rows = [SampledRow(i, by_slot[item.served.slot]) for i, item in enumerate(items.decode)]
        for c, item in enumerate(items.prefill):
            request = by_slot[item.served.slot]
            request.num_prefilled += len(item.tokens)
            if item.final:
                rows.append(SampledRow(bucket.decode + c, request))
        for row in rows:
            row.request.num_dispatched += 1
        return rows

    def accept(
        self, rows: Sequence[SampledRow], sampled: dict[str, np.ndarray], now: float, epoch: int
    ) -> None:
        """Hands read tokens to their requests; those that end give everything back.

        Args:
            rows: As `sent` returned them.
            sampled: tokens, logprob and, at level full, top_ids, top_logp, rank; numpy.
            now: Seconds.
            epoch: The last step dispatched.
        """
        for row in rows:
            request, i = row.request, row.row
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
                piece = request.fail(self._why_nan(request), now)
            else:
                piece = request.accept(token, logprob, alternatives, now, rank=rank)
            if request.finished:
                self._release(request, epoch)
            self._tell(request, piece)

    def _why_nan(self, request: Request) -> str:
        """Whose NaN it is, as far as weights can tell."""
        version = self._versions.get(request.id)
        if version is None:
            return "the base model gave NaN: its weights are not finite, or overflow on this prompt"
        try:
            finite = self.store.is_finite(version)
        except AdapterError as error:  # its folder has changed since; the device has what it was
            return f"the model gave NaN under adapter {version.name!r}, whose weights cannot be checked: {error}"
        if finite:
            mine, theirs = f"the weights of adapter {version.name!r} are finite", "those of the base model are not"
            return f"the model gave NaN: {mine}; {theirs}, or something overflows on this prompt"
        return f"the model gave NaN: the weights of adapter {version.name!r} are not finite"

    def cancel(self, request_id: str, now: float, epoch: int) -> bool:
        """Ends a request at once; returns whether it was still alive."""
        request = self.waiting.get(request_id) or self.running.get(request_id)
        if request is None:
            return False
        piece = request.abort(now)
        if request_id in self.running:
            self._release(request, epoch)
        else:
            self._leave_queue(request)
        self._tell(request, piece)
        return True

    def _release(self, request: Request, epoch: int) -> None:
        del self.running[request.id]
        self._end(request)
        self.kv.free(request.kv_pages, epoch)
        self.slots.release(request.slot, epoch)
        self._pages.pop(request.id, None)
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
        for kept in (self.waiting, self.running, self._live):
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
