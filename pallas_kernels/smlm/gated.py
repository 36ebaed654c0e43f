"""The expand of gate and up folded into the gated activation that reads them: for many rows, on a GPU.

Adding the delta in place reads and writes the widest activation of a layer once more than the layer needs.
"""

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.smlm.activation import ACTIVATIONS, check_activation, gated
from pallas_kernels.smlm.api import _check_arrays, _check_plan, _choose
from pallas_kernels.smlm.checks import check_count, check_rank
from pallas_kernels.smlm.plan import WIDE, SmlmPlan
from pallas_kernels.smlm.triton import Launch, first_rows
from pallas_kernels.smlm.triton_kernels import F32, load_S, product
from pallas_kernels.smlm.triton_tiles import Cut, Group, Tile
from pallas_kernels.smlm.tuning import MAX_DECODE_ROWS, SmlmConfig, default_config


class Gated(NamedTuple):
    """What `smlm_gated` computes.

    Attributes:
        out: act(gate) * up of all rows.
        kept: gate and up with their delta, of the first rows; None unless asked for.
        S: x A^T of the first rows by target and page, 0 where a row has no such page; None if none are kept.
    """

    out: Float[Array, "T F"]
    kept: Float[Array, "K 2F"] | None
    S: Float[Array, "K 2 MP R"] | None


def gate_fused(activation: str, implementation: str | None) -> bool:
    """Whether `smlm_gated` is the way to compute a gated activation of many rows: there are kernels, and one has it.

    Args:
        activation: Name of the activation.
        implementation: As for `smlm`.
    """
    return _choose(implementation) != "xla" and activation in ACTIVATIONS


def smlm_gated(
    x: Float[Array, "T in"],
    A: Float[Array, "P 2R in"],
    B: Float[Array, "P R 2F"],
    plan: SmlmPlan,
    *,
    y: Float[Array, "T 2F"],
    activation: str,
    keep_rows: int = 0,
    keep_y: bool = True,
) -> Gated:
    """act(gate) * up, where gate and up are the halves of y plus the delta of `smlm`. Pallas-Triton only.

    gate and up are rounded to y's dtype as `smlm` rounds them, act(gate) is computed in float32 and rounded, and so is
    the product. Every row is computed, without adapter from y alone.

    Args:
        x: Inputs, bfloat16, float16 or float32.
        A: Pages of gate and up, x's dtype.
        B: Pages, columns of gate and up side by side, x's dtype.
        plan: Work list of `build_plan`.
        y: gate and up of the base, x's dtype.
        activation: A key of `activation.ACTIVATIONS`.
        keep_rows: K, leading rows whose S is returned for a backward.
        keep_y: Whether gate and up of those rows are returned too.

    Raises:
        ValueError: shapes disagree or are no multiples of 16, x has fewer than keep_rows rows, or no kernel has the
            activation.
        TypeError: dtypes disagree.
    """
    check_activation(activation)
    check_rank("y", y, 2)
    half = y.shape[1] // 2
    _check_arrays(x, A, B, y, (half, half))
    _check_plan(plan, x.shape[0])
    check_count("keep_rows", keep_rows, x.shape[0])
    plan = SmlmPlan(*map(jnp.asarray, plan))
    return smlm_gated_triton(x, A, B, plan, y, activation, keep_rows, keep_y)


def gated_config(x: Float[Array, "T in"], half: int, max_pages: int) -> SmlmConfig:
    """The configuration of `smlm` for these shapes, with one S for all blocks and blocks of two halves."""
    rows = max(x.shape[0], MAX_DECODE_ROWS + 1)  # tiles are wide however few there are
    config = default_config(rows, x.shape[1], (half, half), max_pages, x.dtype)
    block_n = 32 if x.dtype.itemsize > 2 else 64
    return replace(config, tile_rows=WIDE, reduce=True, block_n=block_n, expand_warps=8, expand_stages=1)


# Jitted so that the layers of a model trace and lower the kernels once a shape.
@functools.partial(jax.jit, static_argnames=("activation", "keep_rows", "keep_y", "config", "interpret"))
def smlm_gated_triton(
    x: Float[Array, "T in"],
    A: Float[Array, "P 2R in"],
    B: Float[Array, "P R 2F"],
    plan: SmlmPlan,
    y: Float[Array, "T 2F"],
    activation: str,
    keep_rows: int,
    keep_y: bool = True,
    *,
    config: SmlmConfig | None = None,
    interpret: bool | None = None,
) -> Gated:
    """`smlm_gated` without its checks.

    Args:
        x, A, B, plan, y, activation, keep_rows, keep_y: As there.
        config: Block sizes, with reduce and tiles of WIDE rows; by default those of `gated_config`.
        interpret: Run as plain XLA operations; by default on the CPU only.
    """
    interpret = jax.default_backend() == "cpu" if interpret is None else interpret
    half = y.shape[1] // 2
    config = config or gated_config(x, half, plan.wide_pages.shape[1])
    work = (plan.used, plan.wide_row, plan.wide_len, plan.wide_pages)
    cut = Cut.of(x, plan.wide_pages, (half, half), config, interpret)
    launch = Launch(cut, config, work)
    S = launch.shrink(x, A, plan.counters)
    outs = (jax.ShapeDtypeStruct((x.shape[0], half), y.dtype),)
    if keep_rows and keep_y:
        outs += (jax.ShapeDtypeStruct((keep_rows, 2 * half), y.dtype),)
    params = plt.CompilerParams(num_warps=config.expand_warps, num_stages=config.expand_stages)
    body = functools.partial(gate, activation, keep_rows)
    found = launch.run("gate", body, pl.cdiv(half, cut.block_n), (S, B, y), outs, {}, params, bare=True)
    kept = found[1] if len(found) > 1 else None
    return Gated(found[0], kept, first_rows(S, keep_rows, plan, 2) if keep_rows else None)


def gate(
    activation: str,
    keep_rows: int,
    cut: Cut,
    tile: Tile,
    part: Array,
    S_ref: Any,
    B_ref: Any,
    y_ref: Any,
    o_ref: Any,
    kept_ref: Any = None,
) -> None:
    """o[rows, block] = act(gate) * up, and kept[rows, both blocks] = gate, up of the leading rows."""
    half = cut.out_features[0]
    columns = part * cut.block_n + jnp.arange(cut.block_n, dtype=jnp.int32)[None, :]
    inside = None if cut.whole_blocks else columns < half
    mask = tile.ok if inside is None else tile.ok & inside
    places = [columns, half + columns]
    base = [plt.load(y_ref.at[tile.rows, at], mask=mask, other=0.0) for at in places]

    def do(group: Group, minus: tuple[Array, ...]) -> tuple[Array, ...]:
        B_mask = group.used[:, None] if inside is None else group.used[:, None] & inside
        new = []
        for target, (at, delta) in enumerate(zip(places, minus, strict=True)):
            b = plt.load(B_ref.at[group.page[:, None], group.rank[:, None], at], mask=B_mask, other=0.0)
            new.append(delta + product(-load_S(cut, tile, group, target, S_ref), b, 0))
        return tuple(new)

    # Minus the delta: of a row without adapter that is 0, and y - 0 is y even where y is -0.
    zero = jnp.zeros((cut.rows, cut.block_n), F32)
    minus = tile.for_page_groups(do, (zero, zero))
    halves = [(y.astype(F32) - delta).astype(y.dtype) for y, delta in zip(base, minus, strict=True)]
    if kept_ref is not None:
        for at, y in zip(places, halves, strict=True):
            plt.store(kept_ref.at[tile.rows, at], y, mask=mask & (tile.rows < keep_rows))
    plt.store(o_ref.at[tile.rows, columns], gated(activation, *halves), mask=mask)
