"""The delta as two Pallas-Triton launches that do not touch y: shrink S = x A^T, then expand S B.

Each program handles one part of one tile; programs of unused tiles exit immediately. Sums have the same fixed order
(spans, then a binary tree) as in the kernels that add in place.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.common.blocks import column_block, masked_load, whole
from pallas_kernels.common.implementation import interpreted
from pallas_kernels.common.products import F32, product, tree_sum
from pallas_kernels.smlm.plan import RANK_PAGE, TILE, SmlmPlan
from pallas_kernels.smlm.tuning import num_spans


@dataclass(frozen=True)
class DeltaConfig:
    """Block sizes of the two launches. They do not affect the order of sums: results are bit-identical.

    Attributes:
        parts: Programs that share the contraction of a shrink: a power of two, at most the number of spans.
        block_k: Inputs per step of the shrink.
        block_n: Outputs per program of the expand.
        shrink_warps, shrink_stages, expand_warps, expand_stages: Triton's num_warps and num_stages.
    """

    parts: int = 8
    block_k: int = 128
    block_n: int = 512
    shrink_warps: int = 4
    shrink_stages: int = 3
    expand_warps: int = 4
    expand_stages: int = 2


def delta_config(dtype: jnp.dtype) -> DeltaConfig:
    """Block sizes tuned on an H200 in a decode step, where the launches share the SMs with the base GEMM."""
    if jnp.dtype(dtype).itemsize > 2:  # float32: no tensor cores, twice the bytes
        return DeltaConfig(block_k=32, block_n=64, shrink_stages=2, expand_stages=1)
    return DeltaConfig()


@dataclass(frozen=True)
class DeltaSizes:
    """Static sizes of one call; the `parts` programs of a tile share the `spans` spans of `span` inputs."""

    tiles: int
    pages: int
    size: int
    spans: int
    span: int
    parts: int
    block_k: int
    block_n: int
    out_features: tuple[int, ...]

    @classmethod
    def of(cls, size: int, tile_pages: Any, out_features: tuple[int, ...], config: DeltaConfig) -> "DeltaSizes":
        spans = num_spans(size)
        span = 16 * math.ceil(size / spans / 16)
        block_k = min(config.block_k, pl.next_power_of_2(span))
        block_n = min(config.block_n, pl.next_power_of_2(max(out_features)))
        parts = min(config.parts, spans)
        return cls(*tile_pages.shape, size, spans, span, parts, block_k, block_n, out_features)

    @property
    def targets(self) -> int:
        return len(self.out_features)

    @property
    def whole_spans(self) -> bool:
        """Whether all blocks of inputs are full and need no mask."""
        return self.span % self.block_k == 0 and self.span * self.spans == self.size

    @property
    def whole_blocks(self) -> bool:
        return all(size % self.block_n == 0 for size in self.out_features)

    @property
    def blocks(self) -> int:
        """Blocks of outputs; none straddles two targets."""
        return sum(pl.cdiv(size, self.block_n) for size in self.out_features)

    def block(self, index: Array) -> tuple[Array, Array, Array]:
        """(target, columns [1, block_n], mask of those that belong to the target) for a block of outputs."""
        return column_block(index, self.out_features, self.block_n)

    def ranks(self, target: Array | int, page: Array) -> Array:
        """Columns of a target's page in the partial sums, [1, RANK_PAGE]."""
        first = (target * self.pages + page) * RANK_PAGE
        return first + jnp.arange(RANK_PAGE, dtype=jnp.int32)[None, :]


class PageTile:
    """Rows [TILE, 1] of a tile, the mask of those in use, and its pages."""

    def __init__(self, sizes: DeltaSizes, number: Array, row_ref: Any, len_ref: Any, pages_ref: Any) -> None:
        offset = jnp.arange(TILE, dtype=jnp.int32)[:, None]
        self.rows, self.ok = row_ref[number] + offset, offset < len_ref[number]
        self._sizes, self._number, self._pages = sizes, number, pages_ref

    def fold(self, do: Callable[[Array, Array, Any], Any], carry: Any) -> Any:
        """Folds do(index, page, carry) over the pages that the tile uses."""
        page = lambda m: self._pages[self._number, m]  # noqa: E731
        if self._sizes.pages == 1:
            return do(jnp.int32(0), page(0), carry)
        count = sum((page(m) > 0).astype(jnp.int32) for m in range(self._sizes.pages))
        return lax.fori_loop(0, count, lambda m, carry: do(m, page(m), carry), carry)


def delta_shrink(sizes: DeltaSizes, tile: PageTile, part: Array, x_ref: Any, A_ref: Any, s_ref: Any) -> None:
    """s[part, rows, (target, page, rank)] = sums of x A^T over the part's spans; targets share the loads of x."""
    spans, rank = sizes.spans // sizes.parts, jnp.arange(RANK_PAGE, dtype=jnp.int32)[:, None]

    def do(m: Array, page: Array, carry: None) -> None:
        def step(number: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            new = []
            for s in range(spans):
                start = (part * spans + s) * sizes.span
                k = start + number * sizes.block_k + jnp.arange(sizes.block_k, dtype=jnp.int32)[None, :]
                inside = None if sizes.whole_spans else k < jnp.minimum(start + sizes.span, sizes.size)
                x = masked_load(x_ref, (tile.rows, k), tile.ok, inside)
                for i in range(sizes.targets):
                    ranks = i * RANK_PAGE + rank
                    a = masked_load(A_ref, (jnp.zeros_like(ranks) + page, ranks, k), inside)
                    new.append(sums[s * sizes.targets + i] + product(x, a, 1))
            return tuple(new)

        zeros = (jnp.zeros((TILE, RANK_PAGE), F32),) * (spans * sizes.targets)
        sums = lax.fori_loop(0, pl.cdiv(sizes.span, sizes.block_k), step, zeros)
        for i in range(sizes.targets):
            total, ranks = tree_sum(list(sums[i :: sizes.targets])), sizes.ranks(i, m)
            mask = jnp.broadcast_to(tile.ok, (TILE, RANK_PAGE))
            plt.store(s_ref.at[part, tile.rows, ranks], total, mask=mask)

    tile.fold(do, None)


def delta_expand(sizes: DeltaSizes, tile: PageTile, part: Array, s_ref: Any, B_ref: Any, o_ref: Any) -> None:
    """o[rows, block] = S B, where S is the ordered sum of the partial sums."""
    target, columns, inside = sizes.block(part)
    rank = jnp.arange(RANK_PAGE, dtype=jnp.int32)[:, None]

    def do(m: Array, page: Array, delta: Array) -> Array:
        b = masked_load(B_ref, (jnp.zeros_like(rank) + page, rank, columns), None if sizes.whole_blocks else inside)
        S = tree_sum([masked_load(s_ref, (p, tile.rows, sizes.ranks(target, m)), tile.ok) for p in range(sizes.parts)])
        return delta + product(S.astype(b.dtype), b, 0)

    delta = tile.fold(do, jnp.zeros((TILE, sizes.block_n), F32))
    plt.store(o_ref.at[tile.rows, columns], delta.astype(o_ref.dtype), mask=tile.ok & inside)


# Jitted so that the layers of a model trace and lower the kernels once per shape (0.2 s each).
@functools.partial(jax.jit, static_argnames=("out_features", "config", "interpret"))
def smlm_delta_triton(
    x: Float[Array, "T in"],
    A: Float[Array, "P nR in"],
    B: Float[Array, "P R out"],
    plan: SmlmPlan,
    out_features: tuple[int, ...],
    *,
    config: DeltaConfig | None = None,
    interpret: bool | None = None,
) -> Float[Array, "T out"]:
    """The delta of rows with an adapter; other rows are uninitialised memory.

    Args:
        x: Inputs.
        A: Pages of the n stacked targets.
        B: Pages, with the targets' columns side by side.
        plan: Work list; its tiles of TILE rows are used.
        out_features: Columns of each target.
        config: Block sizes; by default those of `delta_config`.
        interpret: Run as plain XLA operations; by default only on CPU.
    """
    interpret = interpreted(interpret)
    config = config or delta_config(x.dtype)
    sizes = DeltaSizes.of(x.shape[1], plan.tile_pages, out_features, config)
    work = (plan.used, plan.tile_row, plan.tile_len, plan.tile_pages)
    s = jax.ShapeDtypeStruct((sizes.parts, x.shape[0], sizes.targets * sizes.pages * RANK_PAGE), F32)
    params = plt.CompilerParams(num_warps=config.shrink_warps, num_stages=config.shrink_stages)
    s = _launch(delta_shrink, sizes, sizes.parts, (*work, x, A), s, params, interpret)
    delta = jax.ShapeDtypeStruct((x.shape[0], sum(out_features)), x.dtype)
    params = plt.CompilerParams(num_warps=config.expand_warps, num_stages=config.expand_stages)
    return _launch(delta_expand, sizes, sizes.blocks, (*work, s, B), delta, params, interpret)


def _launch(
    body: Callable[..., None],
    sizes: DeltaSizes,
    parts: int,
    args: tuple[Array, ...],
    out: jax.ShapeDtypeStruct,
    params: plt.CompilerParams,
    interpret: bool,
) -> Array:
    """Runs `body` once for every part of every used tile."""

    def kernel(used_ref: Any, row_ref: Any, len_ref: Any, pages_ref: Any, *refs: Any) -> None:
        number, part = (f(pl.program_id(0), jnp.int32(parts)) for f in (lax.div, lax.rem))

        @pl.when(number < used_ref[0])
        def _() -> None:
            body(sizes, PageTile(sizes, number, row_ref, len_ref, pages_ref), part, *refs)

    kernel.__name__ = f"smlm_{body.__name__}"  # shown in profiles
    return pl.pallas_call(
        kernel,
        grid=(sizes.tiles * parts,),
        in_specs=[whole(a) for a in args],
        out_specs=whole(out),
        out_shape=out,
        compiler_params=params,
        interpret=interpret,
        name=kernel.__name__,
    )(*args)
