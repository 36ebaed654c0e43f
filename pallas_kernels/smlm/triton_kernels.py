"""Bodies of the Triton kernels; one program handles one part of one tile.

Every dimension is indexed with arrays, because masked loads that mix arrays and slices do not run in interpret mode.
Every masked load sets `other`: masked lanes touch no memory and enter products as zero.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array

from pallas_kernels.common.products import F32, add, product, tree_sum
from pallas_kernels.smlm.plan import RANK_PAGE
from pallas_kernels.smlm.triton_tiles import CallSizes, Group, Tile


def _partial_sums(
    sizes: CallSizes,
    tile: Tile,
    group: Group,
    targets: list[Array | int],
    first_span: Array | int,
    spans: int,
    x_ref: Any,
    A_ref: Any,
) -> list[Array]:
    """Per target, the sum of x A^T over `spans` spans from `first_span` on; [rows, ranks of the group] float32.

    The spans advance in lockstep: independent accumulators keep the tensor cores and loads busy.
    """
    masked = sizes.span % sizes.block_k != 0 or sizes.span * sizes.spans != sizes.in_features

    def step(number: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        new = []
        for s in range(spans):
            start = (first_span + s) * sizes.span
            k = start + number * sizes.block_k + jnp.arange(sizes.block_k, dtype=jnp.int32)[None, :]
            inside = k < jnp.minimum(start + sizes.span, sizes.in_features) if masked else None
            x_mask = tile.ok & inside if masked else tile.ok
            x = plt.load(x_ref.at[tile.rows, k], mask=x_mask, other=0.0)
            A_mask = group.used[:, None] & inside if masked else group.used[:, None]
            for i, target in enumerate(targets):
                ranks = (target * RANK_PAGE + group.rank)[:, None]
                a = plt.load(A_ref.at[group.page[:, None], ranks, k], mask=A_mask, other=0.0)
                new.append(sums[s * len(targets) + i] + product(x, a, 1))
        return tuple(new)

    zero = jnp.zeros((sizes.rows, group.ranks), F32)
    sums = lax.fori_loop(0, pl.cdiv(sizes.span, sizes.block_k), step, (zero,) * (spans * len(targets)))
    return [tree_sum(list(sums[i :: len(targets)])) for i in range(len(targets))]


def shrink(sizes: CallSizes, tile: Tile, part: Array, x_ref: Any, A_ref: Any, h_ref: Any) -> None:
    """h[part, rows, (target, rank)] = sums of x A^T over the part's spans; targets share the loads of x."""
    spans = sizes.spans // sizes.parts

    def do(group: Group, carry: None) -> None:
        sums = _partial_sums(sizes, tile, group, list(range(sizes.targets)), part * spans, spans, x_ref, A_ref)
        for i, total in enumerate(sums):
            plt.store(h_ref.at[part, tile.rows, _ranks(sizes, group, i)], total, mask=tile.ok & group.used[None, :])

    tile.for_page_groups(do, None)


def _ranks(sizes: CallSizes, group: Group, target: Array | int) -> Array:
    """Columns of a target's ranks in h and S."""
    return (target * (sizes.max_pages * RANK_PAGE) + group.slot)[None, :]


def load_S(sizes: CallSizes, tile: Tile, group: Group, target: Array | int, S_ref: Any) -> Array:
    """Loads S of a target, as written by `shrink_and_reduce`."""
    at = S_ref.at[tile.rows, _ranks(sizes, group, target)]
    return plt.load(at, mask=tile.ok & group.used[None, :], other=0.0)


def _sum_partials(sizes: CallSizes, tile: Tile, group: Group, target: Array | int, h_ref: Any) -> Array:
    """S of a target: the sum over all parts, in a fixed order."""
    mask, ranks = tile.ok & group.used[None, :], _ranks(sizes, group, target)
    parts = [plt.load(h_ref.at[p, tile.rows, ranks], mask=mask, other=0.0) for p in range(sizes.parts)]
    if len(parts) == 1:
        return parts[0]
    # The last addition is a reduction: if all were elementwise, the compiler would convert the layout of every part for
    # the following product, with two barriers each, before adding them.
    half = len(parts) // 2
    left, right = tree_sum(parts[:half])[..., None], tree_sum(parts[half:])[..., None]
    return jnp.concatenate([left, right], axis=-1).sum(axis=-1)


def _finish_shrink(sizes: CallSizes, tile: Tile, h_ref: Any, S_ref: Any) -> None:
    """S of all targets from the partial sums, rounded to the operands' dtype."""

    def do(group: Group, carry: None) -> None:
        for i in range(sizes.targets):
            S = _sum_partials(sizes, tile, group, i, h_ref).astype(S_ref.dtype)
            plt.store(S_ref.at[tile.rows, _ranks(sizes, group, i)], S, mask=tile.ok & group.used[None, :])

    tile.for_page_groups(do, None)


def shrink_and_reduce(
    sizes: CallSizes,
    tile: Tile,
    part: Array,
    x_ref: Any,
    A_ref: Any,
    _: Any,
    h_ref: Any,
    S_ref: Any,
    counters_ref: Any,
) -> None:
    """Shrink; the program of a tile that finishes last adds up the parts and resets the tile's counter to 0.

    The counters operand is aliased to the result of the same name.

    Which program is last varies, but not what it computes. The barrier ensures that all threads have stored before one
    of them counts; the atomics acquire and release at GPU scope.
    """
    shrink(sizes, tile, part, x_ref, A_ref, h_ref)
    if not sizes.interpret:
        plt.debug_barrier()
    before = plt.atomic_add(counters_ref, (tile.number,), jnp.int32(1))

    @pl.when(before == sizes.parts - 1)
    def _() -> None:
        _finish_shrink(sizes, tile, h_ref, S_ref)
        plt.atomic_add(counters_ref, (tile.number,), jnp.int32(-sizes.parts))


class _Block:
    """A block of y for one tile. It is loaded first, so that the loads overlap with the computation of S."""

    def __init__(self, sizes: CallSizes, tile: Tile, part: Array, y_ref: Any) -> None:
        self.target, self.columns, inside = sizes.block(part)
        self._inside = None if sizes.whole_blocks else inside
        self._tile = tile
        self._mask = tile.ok if self._inside is None else tile.ok & self._inside
        self._y = plt.load(y_ref.at[tile.rows, self.columns], mask=self._mask, other=0.0)

    def load_B(self, group: Group, B_ref: Any) -> Array:
        mask = group.used[:, None] if self._inside is None else group.used[:, None] & self._inside
        return plt.load(B_ref.at[group.page[:, None], group.rank[:, None], self.columns], mask=mask, other=0.0)

    def store(self, delta: Array, o_ref: Any) -> None:
        y = add(self._y.astype(F32), delta).astype(self._y.dtype)
        plt.store(o_ref.at[self._tile.rows, self.columns], y, mask=self._mask)


def expand(sizes: CallSizes, tile: Tile, part: Array, h_ref: Any, B_ref: Any, y_ref: Any, o_ref: Any) -> None:
    """y[rows, block] += S B, where S is the ordered sum of the partial sums."""
    block = _Block(sizes, tile, part, y_ref)

    def do(group: Group, delta: Array) -> Array:
        b = block.load_B(group, B_ref)
        S = _sum_partials(sizes, tile, group, block.target, h_ref)
        return delta + product(S.astype(b.dtype), b, 0)

    block.store(tile.for_page_groups(do, jnp.zeros((sizes.rows, sizes.block_n), F32)), o_ref)


def expand_reduced(sizes: CallSizes, tile: Tile, part: Array, S_ref: Any, B_ref: Any, y_ref: Any, o_ref: Any) -> None:
    """y[rows, block] += S B."""
    block = _Block(sizes, tile, part, y_ref)

    def do(group: Group, delta: Array) -> Array:
        b = block.load_B(group, B_ref)
        return delta + product(load_S(sizes, tile, group, block.target, S_ref), b, 0)

    block.store(tile.for_page_groups(do, jnp.zeros((sizes.rows, sizes.block_n), F32)), o_ref)
