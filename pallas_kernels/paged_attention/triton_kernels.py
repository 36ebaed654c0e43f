"""Bodies of the paged attention kernels.

Restricted to what both Triton and interpret mode support: masked loads index every dimension with arrays and set
`other`; all sizes are powers of two. Masked lanes load zeros, so that garbage keys and values never enter a dot.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array

LOG2E = math.log2(math.e)
MASKED = -1e30


@dataclass(frozen=True)
class Shape:
    """Static sizes of one launch.

    Attributes:
        block_rows: Query rows per block.
        group: Query heads per kv head.
        rows: Rows of the score matrix, >= block_rows * group, a power of two.
        dim: Head size.
        lanes: `dim` rounded up to a power of two.
        page_size: Positions per page.
        keys: Keys per iteration.
        parts: Programs that share a block's keys.
        part_keys: Keys per part, a multiple of `keys`; part i starts at key i * part_keys.
        scale: Factor of the scores.
        window: Sliding window or None.
    """

    block_rows: int
    group: int
    rows: int
    dim: int
    lanes: int
    page_size: int
    keys: int
    parts: int
    part_keys: int
    scale: float
    window: int | None


def _rows(shape: Shape, block: Array, head: Array) -> tuple[Array, Array, Array]:
    """(row of q, query head, whether it belongs to this block) for every row of the score matrix."""
    index = jnp.arange(shape.rows)
    offset = index // shape.group
    inside = index < shape.block_rows * shape.group
    return block * shape.block_rows + offset, head * shape.group + index % shape.group, inside


def _lanes(shape: Shape) -> tuple[Array, Array]:
    lane = jnp.arange(shape.lanes)[None, :]
    return lane, lane < shape.dim


def _dot(a: Array, b: Array, trans_b: bool = False) -> Array:
    """A dot with float32 accumulation; float32 operands are not rounded to TF32."""
    return plt.dot(a, b, trans_b=trans_b, allow_tf32=False if a.dtype == jnp.float32 else None)


def attend_part(
    shape: Shape, seq_ref: Any, pos_ref: Any, len_ref: Any, tables_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any,
    out_ref: Any, top_ref: Any = None, sum_ref: Any = None,
) -> None:
    """Online softmax of one block and kv head over one part of its keys.

    With one part, writes the result to out_ref [T, N, H]. Otherwise writes the unnormalised sum to out_ref
    [parts, T, N, H], and the maximum (base 2) and the denominator to top_ref and sum_ref [parts, T, N].
    """
    block, head, part = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    seq, pos, length = seq_ref[block], pos_ref[block], len_ref[block]
    row, query_head, inside = _rows(shape, block, head)
    lane, in_dim = _lanes(shape)
    offset = row - block * shape.block_rows
    used = inside & (offset < length)
    q_at = (row[:, None], query_head[:, None], lane)
    q = plt.load(q_ref.at[q_at], mask=used[:, None] & in_dim, other=0.0)
    position = pos + offset
    end = jnp.where(length > 0, pos + length, 0)
    low = 0 if shape.window is None else jnp.maximum(pos - shape.window + 1, 0)
    first = jnp.maximum(low // shape.keys, part * (shape.part_keys // shape.keys))
    last = jnp.minimum(pl.cdiv(end, shape.keys), (part + 1) * (shape.part_keys // shape.keys))

    def load(ref: Any, page: Array, slot: Array, held: Array) -> Array:
        at = (page[:, None], slot[:, None], jnp.full((1, 1), head, jnp.int32), lane)
        return plt.load(ref.at[at], mask=held[:, None] & in_dim, other=0.0)

    def step(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        mixed, top, total = carry
        t = i * shape.keys + jnp.arange(shape.keys)
        held = (t >= low) & (t < end)
        page = plt.load(tables_ref.at[jnp.full_like(t, seq), t // shape.page_size], mask=held, other=0)
        slot = t % shape.page_size
        k = load(k_ref, page, slot, held)
        v = load(v_ref, page, slot, held)
        seen = (t[None, :] <= position[:, None]) & held[None, :] & used[:, None]
        if shape.window is not None:
            seen &= t[None, :] > position[:, None] - shape.window
        scores = jnp.where(seen, _dot(q, k, trans_b=True) * (shape.scale * LOG2E), MASKED)
        new_top = jnp.maximum(top, scores.max(axis=1))
        weights = jnp.where(seen, jnp.exp2(scores - new_top[:, None]), 0.0)
        shrink = jnp.exp2(top - new_top)
        mixed = mixed * shrink[:, None] + _dot(weights.astype(v.dtype), v)
        return mixed, new_top, total * shrink + weights.sum(axis=1)

    start = (
        jnp.zeros((shape.rows, shape.lanes), jnp.float32),
        jnp.full((shape.rows,), MASKED, jnp.float32),
        jnp.zeros((shape.rows,), jnp.float32),
    )
    mixed, top, total = lax.fori_loop(first, last, step, start)
    if shape.parts == 1:
        out = mixed / jnp.where(total == 0, 1.0, total)[:, None]
        plt.store(out_ref.at[q_at], out.astype(out_ref.dtype), mask=inside[:, None] & in_dim)
        return
    store = inside & (first < last)  # the merge skips parts without keys
    plt.store(out_ref.at[(part, *q_at)], mixed, mask=store[:, None] & in_dim)
    plt.store(top_ref.at[part, row, query_head], top, mask=store)
    plt.store(sum_ref.at[part, row, query_head], total, mask=store)


def merge_parts(
    shape: Shape, pos_ref: Any, len_ref: Any, mixed_ref: Any, top_ref: Any, sum_ref: Any, out_ref: Any
) -> None:
    """Merges the parts of one block and kv head in the order of their keys."""
    block, head = pl.program_id(0), pl.program_id(1)
    pos, length = pos_ref[block], len_ref[block]
    row, query_head, inside = _rows(shape, block, head)
    lane, in_dim = _lanes(shape)
    end = jnp.where(length > 0, pos + length, 0)
    low = 0 if shape.window is None else jnp.maximum(pos - shape.window + 1, 0)

    def step(part: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        mixed, top, total = carry
        where = jnp.full_like(row, part)
        its_top = plt.load(top_ref.at[where, row, query_head], mask=inside, other=MASKED)
        its_total = plt.load(sum_ref.at[where, row, query_head], mask=inside, other=0.0)
        at = (where[:, None], row[:, None], query_head[:, None], lane)
        its_mixed = plt.load(mixed_ref.at[at], mask=inside[:, None] & in_dim, other=0.0)
        new_top = jnp.maximum(top, its_top)
        mine, its = jnp.exp2(top - new_top), jnp.exp2(its_top - new_top)
        return mixed * mine[:, None] + its_mixed * its[:, None], new_top, total * mine + its_total * its

    start = (
        jnp.zeros((shape.rows, shape.lanes), jnp.float32),
        jnp.full((shape.rows,), MASKED, jnp.float32),
        jnp.zeros((shape.rows,), jnp.float32),
    )
    mixed, _, total = lax.fori_loop(low // shape.part_keys, pl.cdiv(end, shape.part_keys), step, start)
    out = mixed / jnp.where(total == 0, 1.0, total)[:, None]
    plt.store(
        out_ref.at[row[:, None], query_head[:, None], lane], out.astype(out_ref.dtype), mask=inside[:, None] & in_dim
    )
