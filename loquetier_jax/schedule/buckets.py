"""Chooses among compiled buckets: the cheapest that covers a needed shape."""

import functools
from collections.abc import Sequence

from loquetier_jax.config import BLOCK, Bucket
from loquetier_jax.schedule.latency import (
    BACKWARD,
    BACKWARD_SLICE,
    FORWARD,
    FORWARD_SLICE,
    NOTHING,
    Key,
    LatencyModel,
    Reads,
)
from loquetier_jax.schedule.types import Snapshot


def blocks(tokens: int) -> int:
    """Rows of a prompt chunk: its tokens rounded up to whole blocks."""
    return -(-tokens // BLOCK) * BLOCK


@functools.lru_cache(maxsize=4096)  # bucket names are computed on access, and every decision needs many
def _forward_key(bucket: Bucket) -> tuple[Key, int]:
    return (FORWARD, bucket.name), bucket.rows


@functools.lru_cache(maxsize=4096)
def _covering(buckets: tuple[Bucket, ...], need: Bucket) -> tuple[Bucket, ...]:
    """The buckets that cover `need` and no other such bucket, which is never slower, whatever noise has measured."""
    able = [b for b in buckets if b.covers(need)]
    return tuple(b for b in able if not any(b.covers(other) and not other.covers(b) for other in able))


def forward_ms(snapshot: Snapshot, bucket: Bucket, latency: LatencyModel, reads: Reads = NOTHING) -> float:
    """Predicted milliseconds of a forward that reads so much, and of its sampler."""
    samplers = sum(s.ms for s in snapshot.samplers if s.rows == bucket.samples)
    return latency.predict(*_forward_key(bucket), reads) + samplers


def forward_late(snapshot: Snapshot, bucket: Bucket, latency: LatencyModel, reads: Reads = NOTHING) -> float:
    """Milliseconds by which one in a hundred exceeds `forward_ms`."""
    samplers = sum(s.late for s in snapshot.samplers if s.rows == bucket.samples)
    return latency.late(*_forward_key(bucket), reads) + samplers


def prefill_buckets(buckets: Sequence[Bucket]) -> list[Bucket]:
    """Buckets with prefill rows and no train or score rows, or all with prefill rows if there are none."""
    able = [b for b in buckets if b.prefill]
    return [b for b in able if not b.packs and not b.score_packs] or able


def decode_reads(snapshot: Snapshot) -> Reads:
    """What one decode of all running requests reads."""
    return Reads(kv_tokens=sum(r.context for r in snapshot.running))


def decode_context(snapshot: Snapshot) -> int:
    """Most tokens that a running request's next row attends to; 0 if none runs."""
    return max((r.context for r in snapshot.running), default=0)


def cheapest(snapshot: Snapshot, need: Bucket, latency: LatencyModel) -> Bucket | None:
    """The fastest bucket that covers `need`, the smallest among equals; None if none covers it."""
    able = _covering(snapshot.buckets, need)
    return min(able, key=lambda b: (forward_ms(snapshot, b, latency), _forward_key(b)[1]), default=None)


@functools.lru_cache(maxsize=4096)
def serving_need(decode: int, prefill: int = 0, chunks: int = 0, context: int = 0) -> Bucket | None:
    """The shape of a step with only inference rows, None if there are none; `context` is that of `limit_of`."""
    if not decode and not prefill:
        return None
    return Bucket(decode=decode, prefill=prefill, chunks=chunks, context=context)


@functools.lru_cache(maxsize=64)
def _limits(buckets: tuple[Bucket, ...]) -> list[int]:
    return sorted({b.context for b in buckets if b.context})


def limit_of(buckets: tuple[Bucket, ...], context: int) -> int:
    """The smallest limit of any bucket within which `context` tokens are; 0 if they are within none."""
    return next((limit for limit in _limits(buckets) if context <= limit), 0)


@functools.lru_cache(maxsize=1024)
def pass_shape(packs: int, pack_tokens: int) -> Bucket:
    """The shape of a step with only a training pass."""
    return Bucket(packs=packs, pack_tokens=pack_tokens)


def slices_times(
    backward: bool, packs: int, pack_tokens: int, count: int, slices: int, latency: LatencyModel
) -> tuple[float, float]:
    """(predicted ms, ms by which one in a hundred exceeds that) of `count` of the `slices` slices of a pass.

    All slices of a backward together run as one call.
    """
    key, rows = _slices_key(backward, pass_shape(packs, pack_tokens), count == slices, latency)
    times = count / slices if key[0] == BACKWARD else count
    return times * latency.predict(key, rows), times * latency.late(key, rows)


def _slices_key(backward: bool, shape: Bucket, all_of_them: bool, latency: LatencyModel) -> tuple[Key, int]:
    """The latency key to predict the time of slices from."""
    (_, name), rows = _forward_key(shape)
    one, whole = (BACKWARD_SLICE if backward else FORWARD_SLICE, name), (BACKWARD, name)
    if not backward:
        return one, rows
    best, second = (whole, one) if all_of_them else (one, whole)
    return (best if latency.known(best) or not latency.known(second) else second), rows
