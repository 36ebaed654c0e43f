"""The queues as the scheduler sees them."""

from typing import TYPE_CHECKING

from loquetier_jax.adapters.store import AdapterStore
from loquetier_jax.schedule.snapshot import Decoding, Prefilling, SlicedShape, Snapshot, Waiting
from loquetier_jax.serve.request import Request

if TYPE_CHECKING:
    from loquetier_jax.runtime.loop import Loop

LOOKAHEAD = 256  # waiting requests shown to one decision


def snapshot(loop: "Loop") -> Snapshot:
    """What a decision depends on, taken now."""
    serving, training, cfg, forecast = loop.serving, loop.training, loop.cfg, loop.forecast()
    running = [r for r in serving.running.values() if 0 < r.num_dispatched < r.params.max_tokens]
    prefilling = [r for r in serving.running.values() if r.num_remaining > 0]
    waiting = list(serving.waiting.values())[:LOOKAHEAD]
    slices = len(loop.functions.slices(cfg.slice_layers))
    train_buckets = training.buckets()
    serving_buckets = [b for b in cfg.buckets if not b.packs]
    return Snapshot(
        now=forecast.ready,
        late_ms=forecast.late_ms,
        buckets=(*serving_buckets, *train_buckets),
        running=tuple(_decoding(r, forecast.tokens) for r in running),
        prefilling=tuple(
            Prefilling(
                id=r.id,
                adapter=r.adapter or "",
                sampling=r.params.level,
                arrival=r.metrics.arrival_time,
                remaining=r.num_remaining,
            )
            for r in prefilling
        ),
        waiting=tuple(_waiting(r, loop) for r in waiting),
        free_slots=serving.slots.num_free,
        free_pages=serving.kv.num_free,
        free_adapter_pages=_reclaimable(serving.store),
        jobs=training.views(),
        train_pass=training.pass_view(),
        sliced=tuple(
            SlicedShape(packs=b.packs, pack_tokens=b.pack_tokens, slices=slices)
            for b in train_buckets
            if cfg.slice_layers and b.rows == b.train_rows
        ),
        slices=slices,
        score=loop.scoring.views(),
        slo=loop.slo,
        fairness=loop.fairness,
    )


def _reclaimable(store: AdapterStore) -> int:
    """Pages free, or of versions that may be evicted."""
    idle = [v for v in store.versions() if v.pages and not v.in_flight and not store.is_pinned(v)]
    return store.pool.num_free + sum(len(v.pages) for v in idle)


def _decoding(request: Request, expected: float) -> Decoding:
    """A running request; a token of it that is in flight is `expected` then."""
    times = request.metrics.token_times
    in_flight = request.num_dispatched > len(times)
    return Decoding(
        id=request.id,
        sampling=request.params.level,
        first_token_time=times[0] if times else expected,
        last_token_time=expected if in_flight else times[-1],
        num_output=request.num_dispatched,
        remaining=request.params.max_tokens - request.num_dispatched,
        pages=len(request.kv_pages),
    )


def _waiting(request: Request, loop: "Loop") -> Waiting:
    version = loop.serving.version(request)
    pinned = version is None or version.in_flight > 0
    return Waiting(
        id=request.id,
        adapter=request.adapter or "",
        sampling=request.params.level,
        arrival=request.metrics.arrival_time,
        prompt_tokens=len(request.prompt_ids),
        pages=loop.serving.kv.pages_for(request.num_tokens),
        adapter_pages=0 if pinned else version.shape.num_pages,
    )
