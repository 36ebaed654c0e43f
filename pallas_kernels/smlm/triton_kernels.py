"""Bodies of the Triton kernels: what one program does for one part of one tile.

Indices are arrays in every dimension, because a masked load that mixes arrays and slices does not run in
interpret mode; every masked load names its `other`. A masked lane touches no memory and enters products
as zero.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array

from pallas_kernels.smlm.plan import RANK_PAGE
from pallas_kernels.smlm.tuning import SmlmConfig, num_spans

MAX_GROUP = 4  # pages that one product takes side by side: 64 ranks
F32 = jnp.float32


@dataclass(frozen=True)
class Cut:
    """Static sizes of one call."""

    rows: int  # of a tile
    max_tiles: int
    max_pages: int
    group: int  # pages that one product takes side by side
    in_features: int
    span: int  # inputs of a span, a multiple of 16
    spans: int
    parts: int  # programs that share the spans of a tile
    block_k: int
    out_features: tuple[int, ...]
    block_n: int
    interpret: bool

    @classmethod
    def of(
        cls, x: Any, tile_pages: Any, out_features: tuple[int, ...], config: SmlmConfig, interpret: bool
    ) -> "Cut":
        size, (tiles, pages) = x.shape[1], tile_pages.shape
        spans = num_spans(size)
        span = 16 * math.ceil(size / spans / 16)
        return cls(
            rows=config.tile_rows,
            max_tiles=tiles,
            max_pages=pages,
            group=min(pl.next_power_of_2(pages), MAX_GROUP),
            in_features=size,
            span=span,
            spans=spans,
            parts=min(config.programs_k, spans),
            block_k=min(config.block_k, pl.next_power_of_2(span)),
            out_features=out_features,
            block_n=min(config.block_n, pl.next_power_of_2(max(out_features))),
            interpret=interpret,
        )

    @property
    def targets(self) -> int:
        return len(self.out_features)

    @property
    def blocks(self) -> int:
        """Blocks of outputs; none straddles two targets."""
        return sum(pl.cdiv(size, self.block_n) for size in self.out_features)

    @property
    def whole_blocks(self) -> bool:
        return all(size % self.block_n == 0 for size in self.out_features)

    def block(self, index: Array) -> tuple[Array, Array, Array]:
        """(target, columns [1, block_n], which of them belong to the target) of a block of outputs."""
        target, column, end = jnp.int32(0), index * self.block_n, jnp.int32(self.out_features[0])
        blocks, start = 0, 0
        for i, size in enumerate(self.out_features[:-1], start=1):
            blocks, start = blocks + pl.cdiv(size, self.block_n), start + size
            here = index >= blocks
            target = jnp.where(here, jnp.int32(i), target)
            column = jnp.where(here, start + (index - blocks) * self.block_n, column)
            end = jnp.where(here, jnp.int32(start + self.out_features[i]), end)
        columns = column + jnp.arange(self.block_n, dtype=jnp.int32)[None, :]
        return target, columns, columns < end


@dataclass
class Tile:
    """Rows and pages of a tile."""

    cut: Cut
    number: Array  # scalar
    length: Array  # scalar
    rows: Array  # [rows, 1]
    ok: Array  # [rows, 1]
    pages: list[Array]  # scalars
    page: Callable[[Array], Array]

    @classmethod
    def load(cls, cut: Cut, tile: Array, row_ref: Any, len_ref: Any, pages_ref: Any) -> "Tile":
        offset = jnp.arange(cut.rows, dtype=jnp.int32)[:, None]
        length = len_ref[tile]
        # Rows beyond the tile keep their own index: a masked lane of a store must not collide with another.
        rows = row_ref[tile] + offset

        def page(m: Array) -> Array:
            return jnp.where(m < cut.max_pages, pages_ref[tile, jnp.minimum(m, cut.max_pages - 1)], 0)

        return cls(cut, tile, length, rows, offset < length, [pages_ref[tile, m] for m in range(cut.max_pages)], page)

    def for_page_groups(self, do: Callable[["Group", Any], Any], carry: Any) -> Any:
        """Folds `do` over groups of the tile's own pages; the loop ends with the last used page."""
        cut = self.cut
        if cut.max_pages <= cut.group:
            return do(Group.of(cut, 0, self.pages + [0] * (cut.group - cut.max_pages)), carry)
        count = sum((page > 0).astype(jnp.int32) for page in self.pages)

        def body(number: Array, carry: Any) -> Any:
            pages = [self.page(number * cut.group + q) for q in range(cut.group)]
            return do(Group.of(cut, number * cut.group, pages), carry)

        return lax.fori_loop(0, lax.div(count + (cut.group - 1), jnp.int32(cut.group)), body, carry)


@dataclass
class Group:
    """Pages side by side: vectors over group * 16 ranks."""

    page: Array
    rank: Array  # in its page
    slot: Array  # rank among all max_pages * 16 ranks of the tile
    used: Array

    @classmethod
    def of(cls, cut: Cut, first: Array | int, pages: list[Array | int]) -> "Group":
        j = jnp.arange(cut.group * RANK_PAGE, dtype=jnp.int32)
        page = jnp.zeros_like(j)
        for q, one in enumerate(pages):
            page = jnp.where(lax.div(j, jnp.int32(RANK_PAGE)) == q, one, page)
        return cls(page, lax.rem(j, jnp.int32(RANK_PAGE)), first * RANK_PAGE + j, page > 0)


def tree_sum(parts: list[Array]) -> Array:
    """Adds neighbours, then neighbours of sums: an aligned part of the list may be summed elsewhere first."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _product(a: Array, b: Array, contract_b: int) -> Array:
    return lax.dot_general(a, b, (((1,), (contract_b,)), ((), ())), preferred_element_type=F32)


def _partial_sums(
    cut: Cut,
    tile: Tile,
    group: Group,
    targets: list[Array | int],
    first_span: Array | int,
    spans: int,
    x_ref: Any,
    A_ref: Any,
) -> list[Array]:
    """Per target, sums of x A^T over `spans` spans from `first_span` on; [rows, group * 16] float32.

    The spans advance side by side: independent chains keep the tensor cores and the loads busy.
    """
    masked = cut.span % cut.block_k != 0 or cut.span * cut.spans != cut.in_features

    def step(number: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        new = []
        for s in range(spans):
            start = (first_span + s) * cut.span
            k = start + number * cut.block_k + jnp.arange(cut.block_k, dtype=jnp.int32)[None, :]
            inside = k < jnp.minimum(start + cut.span, cut.in_features) if masked else None
            x_mask = tile.ok & inside if masked else tile.ok
            x = plt.load(x_ref.at[tile.rows, k], mask=x_mask, other=0.0)
            A_mask = group.used[:, None] & inside if masked else group.used[:, None]
            for i, target in enumerate(targets):
                ranks = (target * RANK_PAGE + group.rank)[:, None]
                a = plt.load(A_ref.at[group.page[:, None], ranks, k], mask=A_mask, other=0.0)
                new.append(sums[s * len(targets) + i] + _product(x, a, 1))
        return tuple(new)

    zero = jnp.zeros((cut.rows, cut.group * RANK_PAGE), F32)
    sums = lax.fori_loop(0, pl.cdiv(cut.span, cut.block_k), step, (zero,) * (spans * len(targets)))
    return [tree_sum(list(sums[i :: len(targets)])) for i in range(len(targets))]


def shrink(cut: Cut, tile: Tile, part: Array, x_ref: Any, A_ref: Any, h_ref: Any) -> None:
    """h[part, rows, (target, rank)] = sums of x A^T over the part's spans; targets share the loads of x."""
    spans = cut.spans // cut.parts

    def do(group: Group, carry: None) -> None:
        sums = _partial_sums(cut, tile, group, list(range(cut.targets)), part * spans, spans, x_ref, A_ref)
        for i, total in enumerate(sums):
            plt.store(h_ref.at[part, tile.rows, _ranks(cut, group, i)], total, mask=tile.ok & group.used[None, :])

    tile.for_page_groups(do, None)


def _ranks(cut: Cut, group: Group, target: Array | int) -> Array:
    """Columns of a target's ranks in h and S."""
    return (target * (cut.max_pages * RANK_PAGE) + group.slot)[None, :]


def _sum_partials(cut: Cut, tile: Tile, group: Group, target: Array | int, h_ref: Any) -> Array:
    """S of a target: the partial sums of all parts, in their one order."""
    mask, ranks = tile.ok & group.used[None, :], _ranks(cut, group, target)
    return tree_sum([plt.load(h_ref.at[p, tile.rows, ranks], mask=mask, other=0.0) for p in range(cut.parts)])


def _finish_shrink(cut: Cut, tile: Tile, h_ref: Any, S_ref: Any) -> None:
    """S of all targets from the partial sums, rounded to the operands' dtype."""

    def do(group: Group, carry: None) -> None:
        for i in range(cut.targets):
            S = _sum_partials(cut, tile, group, i, h_ref).astype(S_ref.dtype)
            plt.store(S_ref.at[tile.rows, _ranks(cut, group, i)], S, mask=tile.ok & group.used[None, :])

    tile.for_page_groups(do, None)


def shrink_and_reduce(
    cut: Cut, tile: Tile, part: Array, x_ref: Any, A_ref: Any, counters_ref: Any, h_ref: Any, S_ref: Any
) -> None:
    """Shrink; the last program of a tile to finish its part adds the parts up and sets the counter back to 0.

    Who is last varies, what it computes does not. All threads have stored (the barrier) before one of them counts;
    the atomics acquire and release at the scope of the GPU.
    """
    shrink(cut, tile, part, x_ref, A_ref, h_ref)
    if not cut.interpret:
        plt.debug_barrier()
    before = plt.atomic_add(counters_ref, (tile.number,), jnp.int32(1))

    @pl.when(before == cut.parts - 1)
    def _() -> None:
        _finish_shrink(cut, tile, h_ref, S_ref)
        plt.atomic_add(counters_ref, (tile.number,), jnp.int32(-cut.parts))


class _Block:
    """A block of y under one tile. It is loaded at once, so that the loads are under way while S is computed."""

    def __init__(self, cut: Cut, tile: Tile, part: Array, y_ref: Any) -> None:
        self.target, self.columns, inside = cut.block(part)
        self._inside = None if cut.whole_blocks else inside
        self._tile = tile
        self._mask = tile.ok if self._inside is None else tile.ok & self._inside
        self._y = plt.load(y_ref.at[tile.rows, self.columns], mask=self._mask, other=0.0)

    def load_B(self, group: Group, B_ref: Any) -> Array:
        mask = group.used[:, None] if self._inside is None else group.used[:, None] & self._inside
        return plt.load(B_ref.at[group.page[:, None], group.rank[:, None], self.columns], mask=mask, other=0.0)

    def store(self, delta: Array, o_ref: Any) -> None:
        y = (self._y.astype(F32) + delta).astype(self._y.dtype)
        plt.store(o_ref.at[self._tile.rows, self.columns], y, mask=self._mask)


def expand(cut: Cut, tile: Tile, part: Array, h_ref: Any, B_ref: Any, y_ref: Any, o_ref: Any) -> None:
    """y[rows, block] += S B, with S the ordered sum of the partial sums."""
    block = _Block(cut, tile, part, y_ref)

    def do(group: Group, delta: Array) -> Array:
        b = block.load_B(group, B_ref)
        S = _sum_partials(cut, tile, group, block.target, h_ref)
        return delta + _product(S.astype(b.dtype), b, 0)

    block.store(tile.for_page_groups(do, jnp.zeros((cut.rows, cut.block_n), F32)), o_ref)


def expand_reduced(cut: Cut, tile: Tile, part: Array, S_ref: Any, B_ref: Any, y_ref: Any, o_ref: Any) -> None:
    """y[rows, block] += S B."""
    block = _Block(cut, tile, part, y_ref)

    def do(group: Group, delta: Array) -> Array:
        b = block.load_B(group, B_ref)
        mask = tile.ok & group.used[None, :]
        S = plt.load(S_ref.at[tile.rows, _ranks(cut, group, block.target)], mask=mask, other=0.0)
        return delta + _product(S, b, 0)

    block.store(tile.for_page_groups(do, jnp.zeros((cut.rows, cut.block_n), F32)), o_ref)
