"""Fuses the expand of gate and up with the gated activation, for many rows on a GPU.

Adding the delta in place would read and write the widest activation of a layer one extra time.
"""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int32

from pallas_kernels.common.activation import kernel_gated
from pallas_kernels.common.implementation import interpreted
from pallas_kernels.common.products import F32, product
from pallas_kernels.smlm.plan import WIDE, SmlmPlan
from pallas_kernels.smlm.triton import Launch, first_rows
from pallas_kernels.smlm.triton_kernels import load_S
from pallas_kernels.smlm.triton_tiles import CallSizes, Group, Tile
from pallas_kernels.smlm.tuning import MAX_DECODE_ROWS, SmlmConfig, smlm_config

Found = tuple[Float[Array, "T F"], Float[Array, "K FF"] | None, Float[Array, "K n MP R"] | None, Int32[Array, " C"]]


def glu_config(x: Float[Array, "T in"], half: int, max_pages: int) -> SmlmConfig:
    """The configuration of `smlm` for these shapes, with S reduced once and blocks that cover both halves."""
    rows = max(x.shape[0], MAX_DECODE_ROWS + 1)  # always use wide tiles
    config = smlm_config(rows, x.shape[1], (half, half), max_pages, x.dtype)
    block_n = 32 if x.dtype.itemsize > 2 else 64
    return replace(config, tile_rows=WIDE, reduce=True, block_n=block_n, expand_warps=8, expand_stages=1)


# Jitted so that the layers of a model trace and lower the kernels once per shape.
@functools.partial(jax.jit, static_argnames=("activation", "keep_rows", "keep_y", "config", "interpret"))
def smlm_glu_triton(
    x: Float[Array, "T in"],
    A: Float[Array, "P RR in"],
    B: Float[Array, "P R FF"],
    plan: SmlmPlan,
    y: Float[Array, "T FF"],
    activation: str,
    keep_rows: int,
    keep_y: bool = True,
    *,
    config: SmlmConfig | None = None,
    interpret: bool | None = None,
) -> Found:
    """`smlm_glu` for many rows: the shrink of `smlm`, then one launch for the expand and the activation.

    Args:
        x, A, B, plan, y: As for `smlm_glu`.
        activation: A key of `common.activation.KERNEL_ACTIVATIONS`.
        keep_rows: K, leading rows whose S is returned for the backward.
        keep_y: Whether gate and up of those rows are returned as well.
        config: Block sizes, with reduce=True and tiles of WIDE rows; by default those of `glu_config`.
        interpret: Run as plain XLA operations; by default only on CPU.

    Returns:
        act(gate) * up, the kept gate and up, S, and the plan's counters, zero again, for the next call.
    """
    interpret = interpreted(interpret)
    half = y.shape[1] // 2
    config = config or glu_config(x, half, plan.wide_pages.shape[1])
    work = (plan.used, plan.wide_row, plan.wide_len, plan.wide_pages)
    sizes = CallSizes.of(x, plan.wide_pages, (half, half), config, interpret)
    launch = Launch(sizes, config, work)
    S, counters = launch.shrink(x, A, plan.counters)
    outs = (jax.ShapeDtypeStruct((x.shape[0], half), y.dtype),)
    if keep_rows and keep_y:
        outs += (jax.ShapeDtypeStruct((keep_rows, 2 * half), y.dtype),)
    params = plt.CompilerParams(num_warps=config.expand_warps, num_stages=config.expand_stages)
    body = functools.partial(gate, activation, keep_rows)
    found = launch.run("gate", body, pl.cdiv(half, sizes.block_n), (S, B, y), outs, {}, params, bare=True)
    kept = found[1] if len(found) > 1 else None
    return found[0], kept, first_rows(S, keep_rows, plan, 2) if keep_rows else None, counters


def gate(
    activation: str,
    keep_rows: int,
    sizes: CallSizes,
    tile: Tile,
    part: Array,
    S_ref: Any,
    B_ref: Any,
    y_ref: Any,
    o_ref: Any,
    kept_ref: Any = None,
) -> None:
    """o[rows, block] = act(gate) * up; also kept[rows, both blocks] = gate, up for the leading rows."""
    half = sizes.out_features[0]
    columns = part * sizes.block_n + jnp.arange(sizes.block_n, dtype=jnp.int32)[None, :]
    inside = None if sizes.whole_blocks else columns < half
    mask = tile.ok if inside is None else tile.ok & inside
    places = [columns, half + columns]
    base = [plt.load(y_ref.at[tile.rows, at], mask=mask, other=0.0) for at in places]

    def do(group: Group, minus: tuple[Array, ...]) -> tuple[Array, ...]:
        B_mask = group.used[:, None] if inside is None else group.used[:, None] & inside
        new = []
        for target, (at, delta) in enumerate(zip(places, minus, strict=True)):
            b = plt.load(B_ref.at[group.page[:, None], group.rank[:, None], at], mask=B_mask, other=0.0)
            new.append(delta + product(-load_S(sizes, tile, group, target, S_ref), b, 0))
        return tuple(new)

    # Accumulate minus the delta: it is 0 in rows without adapter, and y - 0 equals y even if y is -0.
    zero = jnp.zeros((sizes.rows, sizes.block_n), F32)
    minus = tile.for_page_groups(do, (zero, zero))
    halves = [(y.astype(F32) - delta).astype(y.dtype) for y, delta in zip(base, minus, strict=True)]
    if kept_ref is not None:
        for at, y in zip(places, halves, strict=True):
            plt.store(kept_ref.at[tile.rows, at], y, mask=mask & (tile.rows < keep_rows))
    plt.store(o_ref.at[tile.rows, columns], kernel_gated(activation, *halves), mask=mask)
