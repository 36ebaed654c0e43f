"""Paged attention as Pallas-Triton launches (Ampere to Hopper); interpret mode on CPU.

One program per (block, kv head, part of the keys) walks the page table with an online softmax. Decode over wide tables
uses split-KV: the number of parts depends only on the table's width, and a second launch merges them in order, so that
a row's result does not depend on the batch. No atomics.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.common.blocks import whole
from pallas_kernels.common.implementation import interpreted
from pallas_kernels.paged_attention.plan import AttentionPlan
from pallas_kernels.paged_attention.triton_kernels import Shape, attend_part, merge_parts

MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class AttentionConfig:
    """Block sizes of the kernel; they affect results only by rounding.

    Attributes:
        keys: Keys per iteration, a power of two >= 16.
        warps: Warps per program.
        stages: Depth of the load pipeline.
        parts: Programs that share one block's keys; 1 needs no merge.
    """

    keys: int = 64
    warps: int = 4
    stages: int = 3
    parts: int = 1


def attention_config(block_rows: int, group: int, head_dim: int, width: int) -> AttentionConfig:
    """The configuration for a table of `width` keys (measurements: benchmarks/kernels/paged_attention.py)."""
    if block_rows > 1:
        wide = padded_rows(block_rows, group) >= 128 or head_dim > 128
        return AttentionConfig(keys=32 if head_dim > 128 else 64, warps=8 if wide else 4, stages=2)
    parts = 1 if width <= 1024 else min(8, -(-width // 1024))
    return AttentionConfig(keys=32 if head_dim > 128 else 64, parts=parts)


def supports_triton(head_dim: int) -> bool:
    """Whether the kernel supports a head size; sizes between powers of two are padded to the next one and masked."""
    return 16 <= head_dim <= MAX_HEAD_DIM and head_dim % 8 == 0


def padded_rows(block_rows: int, group: int) -> int:
    """Rows of the score matrix: the block's query heads, padded for tensor cores."""
    return max(16, pl.next_power_of_2(block_rows * group))


def paged_attention_triton(
    q: Float[Array, "T N H"],
    k_pages: Float[Array, "P S K H"],
    v_pages: Float[Array, "P S K H"],
    plan: AttentionPlan,
    *,
    block_rows: int,
    scale: float,
    window: int | None = None,
    config: AttentionConfig | None = None,
    interpret: bool | None = None,
) -> Float[Array, "T N H"]:
    """Same contract as `paged_attention`.

    Args:
        q, k_pages, v_pages, plan, block_rows, scale, window: As for `paged_attention`.
        config: Block sizes; by default chosen from the shapes.
        interpret: Run as plain XLA operations; by default only on CPU.
    """
    interpret = interpreted(interpret)
    rows, heads, dim = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    width = plan.tables.shape[1] * page_size
    group = heads // kv_heads
    config = config or attention_config(block_rows, group, dim, width)
    shape = Shape(
        block_rows=block_rows, group=group, rows=padded_rows(block_rows, group), dim=dim,
        lanes=pl.next_power_of_2(dim), page_size=page_size, keys=config.keys, parts=config.parts,
        part_keys=-(-width // (config.parts * config.keys)) * config.keys, scale=scale, window=window,
    )
    work = (plan.block_seq, plan.block_pos, plan.block_len, plan.tables)
    out = jax.ShapeDtypeStruct(q.shape, q.dtype)
    call = functools.partial(_call, shape=shape, config=config, interpret=interpret)
    grid = (plan.block_seq.shape[0], kv_heads)
    if config.parts == 1:
        return call(attend_part, (*grid, 1), (*work, q, k_pages, v_pages), [out])[0]
    parts = (config.parts, rows, heads)
    partial = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((*parts, dim), parts, parts)]
    partial = call(attend_part, (*grid, config.parts), (*work, q, k_pages, v_pages), partial)
    return call(merge_parts, grid, (plan.block_pos, plan.block_len, *partial), [out])[0]


def _call(
    body: Any, grid: tuple[int, ...], args: tuple[Array, ...], outs: list[Any], *, shape: Shape,
    config: AttentionConfig, interpret: bool,
) -> list[Array]:
    """Launches `body(shape, *refs)`; the kernels address whole arrays."""
    return pl.pallas_call(
        functools.partial(body, shape),
        grid=grid,
        in_specs=[whole(a) for a in args],
        out_specs=[whole(a) for a in outs],
        out_shape=outs,
        compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        interpret=interpret,
        name=f"paged_{body.__name__}",
    )(*args)
