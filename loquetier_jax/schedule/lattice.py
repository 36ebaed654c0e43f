"""Choosing among compiled shapes: the cheapest that covers a need."""

import functools

from loquetier_jax.config import BLOCK, Bucket, Sampling
from loquetier_jax.schedule.latency import BACKWARD, BACKWARD_SLICE, FORWARD, FORWARD_SLICE, Key, LatencyModel


def blocks(tokens: int) -> int:
    """Rows that a prompt chunk takes: tokens rounded up to whole blocks."""
    return -(-tokens // BLOCK) * BLOCK


@functools.lru_cache(maxsize=4096)  # names are composed anew at every access, and every decision asks for many
def _forward_key(bucket: Bucket) -> tuple[Key, int]:
    return (FORWARD, bucket.name), bucket.rows


@functools.lru_cache(maxsize=4096)
def _covering(buckets: tuple[Bucket, ...], need: Bucket) -> tuple[Bucket, ...]:
    return tuple(b for b in buckets if b.covers(need))


def forward_ms(bucket: Bucket, latency: LatencyModel) -> float:
    """Predicted milliseconds of a forward."""
    return latency.predict(*_forward_key(bucket))


def cheapest(buckets: tuple[Bucket, ...], need: Bucket, latency: LatencyModel) -> Bucket | None:
    """The quickest bucket that covers `need`, of equals the smallest; None when none covers it."""
    able = _covering(buckets, need)
    return min(able, key=lambda b: (forward_ms(b, latency), _forward_key(b)[1]), default=None)


@functools.lru_cache(maxsize=4096)
def serving_need(decode: int, sampling: Sampling, prefill: int = 0, chunks: int = 0) -> Bucket | None:
    """The shape of inference rows alone; None when there are none."""
    if not decode and not prefill:
        return None
    return Bucket(decode=decode, prefill=prefill, chunks=chunks, sampling=sampling)


def slices_ms(backward: bool, packs: int, pack_tokens: int, count: int, slices: int, latency: LatencyModel) -> float:
    """Predicted milliseconds of `count` of the `slices` slices of a pass; all of them are one call."""
    shape = Bucket(packs=packs, pack_tokens=pack_tokens)
    one = (BACKWARD_SLICE if backward else FORWARD_SLICE, shape.name)
    if backward and count == slices and (latency.known((BACKWARD, shape.name)) or not latency.known(one)):
        return latency.predict((BACKWARD, shape.name), shape.rows)
    if not latency.known(one) and latency.known((BACKWARD, shape.name)) and backward:
        return latency.predict((BACKWARD, shape.name), shape.rows) * count / slices
    return count * latency.predict(one, shape.rows)
