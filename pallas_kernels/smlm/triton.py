"""The op as Pallas-Triton launches, for Ampere to Hopper; interpret mode on CPU.

Shrink computes S = x A^T, with the contraction of a tile split between programs; expand adds S B to y in place. A grid
of bounded size iterates over (tile, part) pairs. Sums have a fixed order: no float atomics.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int32

from pallas_kernels.common.blocks import whole
from pallas_kernels.common.implementation import interpreted
from pallas_kernels.smlm.plan import RANK_PAGE, TILE, SmlmPlan
from pallas_kernels.smlm.ref import row_pages
from pallas_kernels.smlm.triton_kernels import expand, expand_reduced, shrink, shrink_and_reduce
from pallas_kernels.smlm.triton_tiles import CallSizes, Tile
from pallas_kernels.smlm.tuning import SmlmConfig, smlm_config

MAX_PROGRAMS = 16384  # beyond this, a program handles several pieces of work


# Jitted so that the layers of a model trace and lower the kernels once per shape (0.2 s each).
@functools.partial(jax.jit, static_argnames=("out_features", "config", "interpret", "S_rows"))
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
    S_rows: int = 0,
) -> tuple[Float[Array, "T out"], Float[Array, "K n MP R"] | None, Int32[Array, " C"]]:
    """y plus the delta, in place if y's buffer may be reused; the delta alone without y.

    Args:
        x: Inputs.
        A: Pages of the n stacked targets.
        B: Pages, with the targets' columns side by side.
        plan: Work list; rows without adapter are in no tile and stay unchanged.
        out_features: Columns of each target.
        y: Added to the delta, or None.
        config: Block sizes; by default chosen from the shapes.
        interpret: Run as plain XLA operations; by default only on CPU.
        S_rows: K; if > 0, S = x A^T of the first K rows is returned as well, 0 for absent pages.

    Returns:
        The sum, S, and the plan's counters, zero again, for the next call.
    """
    if x.shape[0] == 0:
        return jnp.zeros((0, sum(out_features)), x.dtype) if y is None else y, None, plan.counters
    interpret = interpreted(interpret)
    config = config or smlm_config(x.shape[0], x.shape[1], out_features, plan.tile_pages.shape[1], x.dtype)
    if S_rows:
        config = replace(config, reduce=True)  # S is needed as a single array
    if y is None:
        y = jnp.zeros((x.shape[0], sum(out_features)), x.dtype)
    if config.tile_rows == TILE:
        work = (plan.used, plan.tile_row, plan.tile_len, plan.tile_pages)
    else:
        work = (plan.used, plan.wide_row, plan.wide_len, plan.wide_pages)
    launch = Launch(CallSizes.of(x, work[-1], out_features, config, interpret), config, work)
    S, counters = launch.shrink(x, A, plan.counters)
    out = launch.expand(S, B, y)
    return out, first_rows(S, S_rows, plan, len(out_features)) if S_rows else None, counters


def first_rows(S: Float[Array, "T nMPR"], rows: int, plan: SmlmPlan, targets: int) -> Float[Array, "K n MP R"]:
    """S of the first rows from a kernel's output, with absent pages set to 0."""
    used = (row_pages(plan)[:rows] > 0)[:, None, :, None]
    return jnp.where(used, S[:rows].reshape(rows, targets, -1, RANK_PAGE), jnp.zeros((), S.dtype))


def of_shape(a: Array) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a result that reuses the buffer of `a`."""
    return jax.ShapeDtypeStruct(a.shape, a.dtype)


@dataclass(frozen=True)
class Launch:
    """The launches of one call."""

    sizes: CallSizes
    config: SmlmConfig
    work: tuple[Array, ...]  # used, and row, length and pages of the tiles

    def shrink(self, x: Array, A: Array, counters: Array) -> tuple[Array, Array]:
        """S (with config.reduce) or its partial sums h, and the counters, which the kernel donates if it uses them."""
        sizes, config = self.sizes, self.config
        params = plt.CompilerParams(num_warps=config.shrink_warps, num_stages=config.shrink_stages)
        h = jax.ShapeDtypeStruct((sizes.parts, x.shape[0], sizes.ranks), jnp.float32)
        if not config.reduce:
            return self.run("shrink", shrink, sizes.parts, (x, A), (h,), {}, params)[0], counters
        outs = h, jax.ShapeDtypeStruct((x.shape[0], sizes.ranks), x.dtype), of_shape(counters)
        alias = {len(self.work) + 2: 2}
        return self.run("shrink_and_reduce", shrink_and_reduce, sizes.parts, (x, A, counters), outs, alias, params)[1:]

    def expand(self, S: Array, B: Array, y: Array) -> Array:
        """y + S B in place, with S as returned by `shrink`."""
        config, body = self.config, expand_reduced if self.config.reduce else expand
        params = plt.CompilerParams(num_warps=config.expand_warps, num_stages=config.expand_stages)
        alias = {len(self.work) + 2: 0}
        return self.run(body.__name__, body, self.sizes.blocks, (S, B, y), (of_shape(y),), alias, params)[0]

    def run(
        self,
        name: str,
        body: Callable[..., None],
        parts: int,
        args: tuple[Array, ...],
        outs: tuple[jax.ShapeDtypeStruct, ...],
        alias: dict[int, int],
        params: plt.CompilerParams,
        *,
        bare: bool = False,
    ) -> tuple[Array, ...]:
        """Runs `body` once for every part of every tile with an adapter, and with `bare` also of those without.

        `name` is shown in profiles; `alias` maps arguments to the results that overwrite them.
        """
        programs = min(self.sizes.max_tiles * parts, MAX_PROGRAMS)
        args = (*self.work, *args)
        return pl.pallas_call(
            self._kernel(body, parts, programs, bare),
            grid=(programs,),
            in_specs=[whole(a) for a in args],
            out_specs=tuple(whole(out) for out in outs),
            out_shape=outs,
            input_output_aliases=alias,
            compiler_params=params,
            interpret=self.sizes.interpret,
            name=f"smlm_{name}",
        )(*args)

    def _kernel(self, body: Callable[..., None], parts: int, programs: int, bare: bool) -> Callable[..., None]:
        sizes, early = self.sizes, self.config.early and not self.sizes.interpret
        wide = sizes.rows != TILE  # only wide tiles include rows without adapter

        def kernel(used_ref: Any, row_ref: Any, len_ref: Any, pages_ref: Any, *refs: Any) -> None:
            def piece(work: Array) -> None:
                number, part = lax.div(work, jnp.int32(parts)), lax.rem(work, jnp.int32(parts))
                tile = Tile.load(sizes, number, row_ref, len_ref, pages_ref)
                wanted = (tile.length > 0) & (tile.pages[0] > 0) if wide and not bare else tile.length > 0
                pl.when(wanted)(lambda: body(sizes, tile, part, *refs))

            first = _release_next(pl.program_id(0)) if early else pl.program_id(0)
            if programs == sizes.max_tiles * parts:
                # An unused tile has length 0; checking `used` first would add a memory latency before the work.
                piece(first)
                return
            used = used_ref[wide + (wide and bare)]
            turns = lax.div(used * parts - first + (programs - 1), jnp.int32(programs))

            def turn(number: Array, carry: None) -> None:
                piece(first + number * programs)

            lax.fori_loop(0, turns, turn, None)

        return kernel


def _release_next(value: Array) -> Array:
    """Returns `value`, after allowing the next kernel's blocks to be scheduled while this one runs; sm_90 and later.

    XLA launches Triton kernels with programmatic dependent launch and starts each with a wait for the previous kernel,
    so that only the launch itself overlaps. Where XLA does not, the instruction has no effect.
    """
    (same,) = plt.elementwise_inline_asm(
        "griddepcontrol.launch_dependents; mov.b32 $0, $1;",
        args=[lax.broadcast(value, (1,))],  # scalars are not supported
        constraints="=r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct((1,), jnp.int32)],
    )
    return jnp.max(same)
