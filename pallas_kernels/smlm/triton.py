"""The op as Pallas-Triton launches: Ampere to Hopper, interpret mode on the CPU.

Shrink computes S = x A^T, its contraction shared by several programs a tile; expand adds S B into y in place.
Work is a list of (tile, part) that a bounded grid walks. Sums have one order: no float atomics.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.smlm.plan import RANK_PAGE, TILE, SmlmPlan
from pallas_kernels.smlm.triton_kernels import Cut, Tile, expand, expand_reduced, shrink, shrink_and_reduce
from pallas_kernels.smlm.tuning import SmlmConfig, default_config

MAX_PROGRAMS = 8192  # beyond it a program takes several pieces of work


# Jitted so that the layers of a model trace and lower the kernels once a shape: 0.2 s each otherwise.
@functools.partial(jax.jit, static_argnames=("out_features", "config", "interpret"))
def smlm_triton(
    x: Float[Array, "T in"],
    A: Float[Array, "P nR in"],
    B: Float[Array, "P R out"],
    plan: SmlmPlan,
    out_features: tuple[int, ...],
    y: Float[Array, "T out"] | None,
    *,
    config: SmlmConfig | None = None,
    interpret: bool | None = None,
) -> Float[Array, "T out"]:
    """y plus the delta, in place where y's buffer may be reused; zeros plus the delta without y.

    Args:
        x: Inputs.
        A: Pages of the n stacked targets.
        B: Pages, columns of the targets side by side.
        plan: Work list; rows without adapter are in no tile, so they stay as they are.
        out_features: Columns of each target.
        y: What the delta is added to, or None.
        config: Block sizes; by default chosen from the shapes.
        interpret: Run as plain XLA operations; by default on the CPU only.
    """
    if x.shape[0] == 0:
        return jnp.zeros((0, sum(out_features)), x.dtype) if y is None else y
    interpret = jax.default_backend() == "cpu" if interpret is None else interpret
    config = config or default_config(x.shape[0], x.shape[1], out_features, plan.tile_pages.shape[1], x.dtype)
    if y is None:
        y = jnp.zeros((x.shape[0], sum(out_features)), x.dtype)
    if config.tile_rows == TILE:
        work = (plan.used[:1], plan.tile_row, plan.tile_len, plan.tile_pages)
    else:
        work = (plan.used[1:], plan.wide_row, plan.wide_len, plan.wide_pages)
    cut = Cut.of(x, work[-1], out_features, config, interpret)
    ranks = cut.targets * cut.max_pages * RANK_PAGE
    y_out = jax.ShapeDtypeStruct(y.shape, y.dtype)
    h_out = jax.ShapeDtypeStruct((cut.parts, x.shape[0], ranks), jnp.float32)
    S_out = jax.ShapeDtypeStruct((x.shape[0], ranks), x.dtype)
    call = functools.partial(_call, cut=cut, interpret=interpret)
    params = plt.CompilerParams(num_warps=config.shrink_warps, num_stages=config.shrink_stages)
    if config.reduce:
        args = (*work, x, A, plan.counters)
        _, S = call(shrink_and_reduce, cut.parts, args, (h_out, S_out), alias={}, params=params)
        second, args = expand_reduced, (*work, S, B, y)
    else:
        args = (*work, x, A)
        (h,) = call(shrink, cut.parts, args, (h_out,), alias={}, params=params)
        second, args = expand, (*work, h, B, y)
    params = plt.CompilerParams(num_warps=config.expand_warps, num_stages=config.expand_stages)
    return call(second, cut.blocks, args, (y_out,), alias={6: 0}, params=params)[0]


def _call(
    body: Callable[..., None],
    parts: int,
    args: tuple[Array, ...],
    outs: tuple[jax.ShapeDtypeStruct, ...],
    *,
    alias: dict[int, int],
    cut: Cut,
    params: plt.CompilerParams,
    interpret: bool,
) -> tuple[Array, ...]:
    """Runs `body` once per part of every used tile; `alias` says which arguments are written in place."""
    programs = min(cut.max_tiles * parts, MAX_PROGRAMS)

    def kernel(used_ref: Any, row_ref: Any, len_ref: Any, pages_ref: Any, *refs: Any) -> None:
        def piece(work: Array) -> None:
            number, part = lax.div(work, jnp.int32(parts)), lax.rem(work, jnp.int32(parts))
            tile = Tile.load(cut, number, row_ref, len_ref, pages_ref)
            pl.when(tile.length > 0)(lambda: body(cut, tile, part, *refs))

        first = pl.program_id(0)
        if programs == cut.max_tiles * parts:
            # An unused tile has length 0; asking `used` first would put one more memory latency before the work.
            piece(first)
            return
        turns = lax.div(used_ref[0] * parts - first + (programs - 1), jnp.int32(programs))

        def turn(number: Array, carry: None) -> None:
            piece(first + number * programs)

        lax.fori_loop(0, turns, turn, None)

    kernel.__name__ = f"smlm_{body.__name__}"  # what a profile shows
    return pl.pallas_call(
        kernel,
        grid=(programs,),
        in_specs=[_whole(a) for a in args],
        out_specs=tuple(_whole(out) for out in outs),
        out_shape=outs,
        input_output_aliases=alias,
        compiler_params=params,
        interpret=interpret,
        name=kernel.__name__,
    )(*args)


def _whole(a: Any) -> pl.BlockSpec:
    """The kernel addresses the array itself."""
    rank = len(a.shape)
    return pl.BlockSpec(a.shape, lambda *_: (0,) * rank)
