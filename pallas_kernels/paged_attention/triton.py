"""Paged attention, Pallas-Triton: one program per block of rows and kv head, softmax in one pass over the keys."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.paged_attention.plan import AttentionPlan

TRITON_HEAD_DIMS = (16, 32, 64, 128, 256)
BLOCK_KEYS = 64
LOW = -1e30  # of masked scores: finite, so that a row without any key stays finite


def _kernel(
    block_seq, block_pos, block_len, tables, q_ref, k_ref, v_ref, out_ref, *, rows, group, height, keys, scale, window
):
    """One block of `rows` rows and the `group` query heads of one kv head, as a matrix of `height` rows."""
    i, head = pl.program_id(0), pl.program_id(1)
    dim, page_size = q_ref.shape[-1], k_ref.shape[1]
    seq, first, length = block_seq[i], block_pos[i], block_len[i]
    m = jnp.arange(height)
    row, column = m // group, jnp.arange(dim)
    inside = (m < rows * group)[:, None]
    at = (i * rows + row)[:, None], (head * group + m % group)[:, None], column[None, :]
    q = plt.load(q_ref.at[at], mask=inside & (row < length)[:, None], other=0.0)
    end, position = first + length, first + row

    def body(j, carry):
        acc, top, total = carry
        t = j * keys + jnp.arange(keys)
        live = t < end  # what lies behind may be anything, NaN included: it is never loaded
        if page_size % keys == 0:
            page = jnp.full((keys,), tables[seq, (j * keys) // page_size])
        else:
            page = plt.load(tables.at[jnp.full((keys,), seq), t // page_size], mask=live, other=0)
        where = page[:, None], (t % page_size)[:, None], jnp.full((1, 1), head), column[None, :]
        k = plt.load(k_ref.at[where], mask=live[:, None], other=0.0)
        v = plt.load(v_ref.at[where], mask=live[:, None], other=0.0)
        s = plt.dot(q, k, trans_b=True) * (scale * math.log2(math.e))
        seen = (t[None, :] <= position[:, None]) & live[None, :] & (row < length)[:, None]
        if window is not None:
            seen &= t[None, :] > position[:, None] - window
        s = jnp.where(seen, s, LOW)
        new_top = jnp.maximum(top, s.max(axis=1))
        p = jnp.where(seen, jnp.exp2(s - new_top[:, None]), 0.0)
        decay = jnp.exp2(top - new_top)
        acc = acc * decay[:, None] + plt.dot(p.astype(v.dtype), v)
        return acc, new_top, total * decay + p.sum(axis=1)

    start = 0 if window is None else jnp.maximum(first - window + 1, 0) // keys
    carry = jnp.zeros((height, dim), jnp.float32), jnp.full((height,), LOW), jnp.zeros((height,), jnp.float32)
    acc, _, total = lax.fori_loop(start, pl.cdiv(end, keys) * (length > 0), body, carry)
    out = acc / jnp.where(total == 0, 1.0, total)[:, None]
    plt.store(out_ref.at[at], out.astype(out_ref.dtype), mask=inside)


def paged_attention_triton(
    q: Float[Array, "T N H"],
    k_pages: Float[Array, "P S K H"],
    v_pages: Float[Array, "P S K H"],
    plan: AttentionPlan,
    block_rows: int,
    scale: float,
    window: int | None = None,
    interpret: bool = False,
) -> Float[Array, "T N H"]:
    """Same contract as `paged_attention`. Probabilities are rounded to the dtype of V for the second product."""
    blocks, kv_heads, group = plan.block_seq.shape[0], k_pages.shape[2], q.shape[1] // k_pages.shape[2]
    height = max(16, 1 << (block_rows * group - 1).bit_length())
    kernel = functools.partial(
        _kernel, rows=block_rows, group=group, height=height, keys=BLOCK_KEYS, scale=scale, window=window
    )
    args = (plan.block_seq, plan.block_pos, plan.block_len, plan.tables, q, k_pages, v_pages)
    whole = [pl.BlockSpec(a.shape, functools.partial(lambda n, *_: (0,) * n, a.ndim)) for a in args]
    return pl.pallas_call(
        kernel,
        grid=(blocks, kv_heads),
        in_specs=whole,
        out_specs=pl.BlockSpec(q.shape, lambda *_: (0, 0, 0)),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=plt.CompilerParams(num_warps=4 if height <= 64 else 8, num_stages=3),
        interpret=interpret,
        name="paged_attention",
    )(*args)
