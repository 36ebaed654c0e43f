"""Paged attention in plain XLA: gathers a block's keys, then `attend_rows`. Any backend, any head size."""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.common.attend_rows import KEY_ALIGN, attend_rows
from pallas_kernels.paged_attention.plan import AttentionPlan

GATHER_BYTES = 2 << 20  # keys, values and scores of one chunk: bounds memory; fastest when it fits the caches


def paged_attention_xla(
    q: Float[Array, "T N H"],
    k_pages: Float[Array, "P S K H"],
    v_pages: Float[Array, "P S K H"],
    plan: AttentionPlan,
    *,
    block_rows: int,
    scale: float,
    window: int | None = None,
) -> Float[Array, "T N H"]:
    """Same contract as `paged_attention`. On CPU, float32 bits depend only on the row (see common/attend_rows.py)."""
    page_size, kv_heads, dim = k_pages.shape[1:]
    tables = _widen(plan.tables, page_size)
    keys = tables.shape[1] * page_size
    blocks = plan.block_seq.shape[0]
    queries = q.reshape(blocks, block_rows, *q.shape[1:])
    scores = 4 * block_rows * q.shape[1] * keys
    chunk = max(1, min(blocks, GATHER_BYTES // (8 * keys * kv_heads * dim + scores)))

    def attend(part: tuple[Array, ...]) -> Array:
        rows, seq, pos, length = part
        size = rows.shape[0]
        row, t = jnp.arange(block_rows)[None], jnp.arange(keys)[None]
        position = pos[:, None] + row
        # Values that no row of the block sees may be garbage; zero them, because 0 * NaN is NaN.
        held = t < (pos + length)[:, None]
        seen = (t[None] <= position[..., None]) & (row < length[:, None])[..., None]
        if window is not None:
            held &= t > pos[:, None] - window
            seen &= t[None] > position[..., None] - window
        pages = tables[seq]
        k = k_pages[pages].reshape(size, keys, kv_heads, dim)
        v = v_pages[pages].reshape(size, keys, kv_heads, dim)
        v = jnp.where(held[..., None, None], v, jnp.zeros((), v.dtype))
        return attend_rows(rows, k, v, seen, scale=scale).astype(q.dtype)

    def attend_if_any(part: tuple[Array, ...]) -> Array:
        """Padding is most of a small step, and its keys are not gathered; its rows are 0."""
        return lax.cond((part[3] > 0).any(), attend, lambda part: jnp.zeros(part[0].shape, q.dtype), part)

    parts = (queries, jnp.asarray(plan.block_seq), jnp.asarray(plan.block_pos), jnp.asarray(plan.block_len))
    return _in_chunks(attend_if_any, parts, blocks, chunk).reshape(q.shape)


def _in_chunks(attend, parts: tuple[Array, ...], blocks: int, chunk: int) -> Array:
    """Runs `attend` over all blocks, `chunk` at a time; the last chunk is padded."""
    if chunk == blocks:
        return attend(parts)
    count = -(-blocks // chunk)

    def split(x: Array) -> Array:
        padded = jnp.pad(x, ((0, count * chunk - blocks),) + ((0, 0),) * (x.ndim - 1))
        return padded.reshape(count, chunk, *x.shape[1:])

    out = lax.map(attend, tuple(split(x) for x in parts))
    return out.reshape(count * chunk, *out.shape[2:])[:blocks]


def _widen(tables: Int[Array, "Q MaxPages"], page_size: int) -> Int[Array, "Q Wider"]:
    """Pads the tables with page 0 until their number of keys is a multiple of KEY_ALIGN."""
    columns = KEY_ALIGN // math.gcd(KEY_ALIGN, page_size)
    return jnp.pad(jnp.asarray(tables), ((0, 0), (0, -tables.shape[1] % columns)))
