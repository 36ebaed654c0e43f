"""Choosing among compiled shapes: the cheapest that covers a need."""

import functools

from loquetier_jax.config import BLOCK, Bucket
from loquetier_jax.schedule.latency import BACKWARD, BACKWARD_SLICE, FORWARD, FORWARD_SLICE, Key, LatencyModel
from loquetier_jax.schedule.types import Snapshot


def blocks(tokens: int) -> int:
    """Rows that a prompt chunk takes: tokens rounded up to whole blocks."""
    return -(-tokens // BLOCK) * BLOCK


@functools.lru_cache(maxsize=4096)  # names are composed anew at every access, and every decision asks for many
def _forward_key(bucket: Bucket) -> tuple[Key, int]:
    return (FORWARD, bucket.name), bucket.rows


@functools.lru_cache(maxsize=4096)
def _covering(buckets: tuple[Bucket, ...], need: Bucket) -> tuple[Bucket, ...]:
    return tuple(b for b in buckets if b.covers(need))


def forward_ms(snapshot: Snapshot, bucket: Bucket, latency: LatencyModel) -> float:
    """Predicted milliseconds of a forward and the sampler behind it."""
    return latency.predict(*_forward_key(bucket)) + sum(s.ms for s in snapshot.samplers if s.rows == bucket.samples)


def forward_late(snapshot: Snapshot, bucket: Bucket, latency: LatencyModel) -> float:
    """Milliseconds by which one of them in a hundred takes longer than predicted."""
    return latency.late(*_forward_key(bucket)) + sum(s.late for s in snapshot.samplers if s.rows == bucket.samples)


def cheapest(snapshot: Snapshot, need: Bucket, latency: LatencyModel) -> Bucket | None:
    """The quickest bucket that covers `need`, of equals the smallest; None when none covers it."""
    able = _covering(snapshot.buckets, need)
    return min(able, key=lambda b: (forward_ms(snapshot, b, latency), _forward_key(b)[1]), default=None)


@functools.lru_cache(maxsize=4096)
def serving_need(decode: int, prefill: int = 0, chunks: int = 0) -> Bucket | None:
    """The shape of inference rows alone; None when there are none."""
    if not decode and not prefill:
        return None
    return Bucket(decode=decode, prefill=prefill, chunks=chunks)


@functools.lru_cache(maxsize=1024)
def pass_shape(packs: int, pack_tokens: int) -> Bucket:
    """The shape of a training pass alone."""
    return Bucket(packs=packs, pack_tokens=pack_tokens)


def slices_times(
    backward: bool, packs: int, pack_tokens: int, count: int, slices: int, latency: LatencyModel
) -> tuple[float, float]:
    """(predicted milliseconds, by how much one in a hundred exceeds them) of `count` of the `slices` slices of a pass.

    All slices of a backward are one call.
    """
    key, rows = _slices_key(backward, pass_shape(packs, pack_tokens), count == slices, latency)
    times = count / slices if key[0] == BACKWARD else count
    return times * latency.predict(key, rows), times * latency.late(key, rows)


def _slices_key(backward: bool, shape: Bucket, all_of_them: bool, latency: LatencyModel) -> tuple[Key, int]:
    """Which measurement the time of some slices is taken from."""
    (_, name), rows = _forward_key(shape)
    one, whole = (BACKWARD_SLICE if backward else FORWARD_SLICE, name), (BACKWARD, name)
    if not backward:
        return one, rows
    best, second = (whole, one) if all_of_them else (one, whole)
    return (best if latency.known(best) or not latency.known(second) else second), rows
