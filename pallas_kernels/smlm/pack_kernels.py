"""Bodies of the Triton kernels of packs: what one program does.

Rows of all packs lie one below the other, and so do the pages of a pack: pack g has rows g*L.. of x and dY, rows
g*R.. of A (R = pages * targets * 16 ranks, in the pages' own order, as dS has them) and g*RT.. of B (RT = pages * 16
ranks, shared by the targets' columns). S has the RT ranks of one target after those of another. Ranks are taken in
chunks that are powers of two. Indices are arrays in every dimension: a masked load that mixes arrays and slices does
not run in interpret mode.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array

from pallas_kernels.common.activation import value_and_slope
from pallas_kernels.common.blocks import block_of
from pallas_kernels.common.products import F32, product
from pallas_kernels.smlm.pack_tuning import MAX_RANKS, Block

Chunks = tuple[tuple[int, int], ...]  # (first rank, ranks)


@dataclass(frozen=True)
class Side:
    """A tall operand, x or dY, and the ranks that its columns meet.

    Attributes:
        packs: G.
        rows: L, rows of a pack.
        sizes: Columns of each target: (in,) of x, out_features of dY.
        ranks: Ranks that a column meets: R of x, RT of dY.
    """

    packs: int
    rows: int
    sizes: tuple[int, ...]
    ranks: int

    @property
    def chunks(self) -> Chunks:
        """All ranks in stretches that are powers of two: no lane is wasted."""
        found, start = [], 0
        while start < self.ranks:
            size = min(MAX_RANKS, 1 << ((self.ranks - start).bit_length() - 1))
            found.append((start, size))
            start += size
        return tuple(found)

    @property
    def windows(self) -> list[Chunks]:
        """The chunks in groups of at most MAX_RANKS ranks: what one program's sums may hold."""
        found: list[Chunks] = []
        for chunk in self.chunks:
            if found and sum(size for _, size in found[-1]) + chunk[1] <= MAX_RANKS:
                found[-1] = (*found[-1], chunk)
            else:
                found.append((chunk,))
        return found

    def blocks(self, width: int) -> int:
        """Blocks of `width` columns, none of which straddles two targets."""
        return sum(pl.cdiv(size, width) for size in self.sizes)

    def block(self, index: Array, width: int) -> tuple[Array, Array, Array]:
        """(target, first column, end of the target's columns) of a block."""
        return block_of(index, self.sizes, width)

    def in_s(self, start: int, size: int, target: Array) -> Array:
        """Where ranks start.. of a target are in a row of S, or of dS for the one target of x."""
        return target * self.ranks + start + jnp.arange(size, dtype=jnp.int32)

    def rows_of(self, pack: Array, first: Array, count: int) -> tuple[Array, Array | None]:
        """Rows first.. of a pack, and which of them it has (None: all)."""
        offset = first + jnp.arange(count, dtype=jnp.int32)
        return pack * self.rows + offset, None if self.rows % count == 0 else offset < self.rows

    def ranks_of(self, pack: Array, start: int, size: int) -> Array:
        """Rows of a pack's pages."""
        return pack * self.ranks + start + jnp.arange(size, dtype=jnp.int32)


@dataclass(frozen=True)
class Cut:
    """How a tall operand is cut for one kind of work, and the ranks that a program handles."""

    side: Side
    block: Block
    ranks: Chunks

    @property
    def strips(self) -> int:
        """Programs of a pack, where one goes through all rows."""
        return self.side.blocks(self.block.columns)

    @property
    def tiles(self) -> int:
        """Programs of a pack, where one has a tile of rows and a span of columns."""
        return pl.cdiv(self.side.rows, self.block.rows) * self.side.blocks(self.block.span)

    def tile(self, pack: Array, index: Array) -> tuple[Any, ...]:
        """(target, part, first column, end, rows, which rows) of a tile; rows vary fastest."""
        tiles, span = jnp.int32(pl.cdiv(self.side.rows, self.block.rows)), self.block.span
        part, tile = lax.div(index, tiles), lax.rem(index, tiles)
        target, start, end = self.side.block(part, span)
        rows, ok = self.side.rows_of(pack, tile * self.block.rows, self.block.rows)
        return target, part, start, jnp.minimum(end, start + span), rows, ok

    @property
    def whole(self) -> bool:
        """Whether every block of columns is full."""
        block = self.block
        return block.span % block.columns == 0 and all(
            size % (block.span or block.columns) == 0 for size in self.side.sizes
        )


def _columns(start: Array, count: int, end: Array, whole: bool) -> tuple[Array, Array | None]:
    columns = start + jnp.arange(count, dtype=jnp.int32)
    return columns, None if whole else columns < end


def _mask(rows: Array | None, columns: Array | None) -> Array | None:
    """The outer product of two masks, where None is all."""
    if rows is None:
        return None if columns is None else columns[None, :]
    return rows[:, None] if columns is None else rows[:, None] & columns[None, :]


def _load(ref: Any, rows: Array, columns: Array, mask: Array | None) -> Array:
    at = ref.at[rows[:, None], columns[None, :]]
    return plt.load(at) if mask is None else plt.load(at, mask=mask, other=0.0)


def shrink(cut: Cut, pack: Array, index: Array, y_ref: Any, w_ref: Any, h_ref: Any) -> None:
    """h[part, tile, ranks] = y w^T over a span of columns: a share of dS, of dY and B."""
    side, block = cut.side, cut.block
    _, part, start, end, rows, ok = cut.tile(pack, index)

    def step(number: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        columns, inside = _columns(start + number * block.columns, block.columns, end, cut.whole)
        y = _load(y_ref, rows, columns, _mask(ok, inside))
        new = []
        for (at, size), total in zip(cut.ranks, sums, strict=True):
            w = _load(w_ref, side.ranks_of(pack, at, size), columns, _mask(None, inside))
            new.append(total + product(y, w, 1))
        return tuple(new)

    sums = tuple(jnp.zeros((block.rows, size), F32) for _, size in cut.ranks)
    sums = lax.fori_loop(0, pl.cdiv(block.span, block.columns), step, sums)
    for (at, size), total in zip(cut.ranks, sums, strict=True):
        ranks = at + jnp.arange(size, dtype=jnp.int32)
        plt.store(h_ref.at[part, rows[:, None], ranks[None, :]], total, mask=_mask(ok, None))


def gradient(cut: Cut, pack: Array, index: Array, y_ref: Any, s_ref: Any, g_ref: Any) -> None:
    """g[ranks, columns] = s^T y over all rows: dA (of dS and x) or dB (of S and dY).

    Formed as y^T s, the tall operand first, as the tensor cores want it.
    """
    side, block = cut.side, cut.block
    target, start, end = side.block(index, block.columns)
    columns, inside = _columns(start, block.columns, end, cut.whole)

    def step(number: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        rows, ok = side.rows_of(pack, number * block.rows, block.rows)
        y = _load(y_ref, rows, columns, _mask(ok, inside))
        new = []
        for (at, size), total in zip(cut.ranks, sums, strict=True):
            s = _load(s_ref, rows, side.in_s(at, size, target), _mask(ok, None))
            new.append(total + product(y, s, 0, contract_a=0))
        return tuple(new)

    sums = tuple(jnp.zeros((block.columns, size), F32) for _, size in cut.ranks)
    sums = lax.fori_loop(0, pl.cdiv(side.rows, block.rows), step, sums)
    for (at, size), total in zip(cut.ranks, sums, strict=True):
        ranks = side.ranks_of(pack, at, size)
        plt.store(g_ref.at[ranks[None, :], columns[:, None]], total, mask=None if inside is None else inside[:, None])


def expand(cut: Cut, pack: Array, index: Array, s_ref: Any, w_ref: Any, *refs: Any) -> None:
    """o[tile, columns] = s w over a span of columns, plus y where refs are y and o, not o alone: dX of dS and A."""
    side, block = cut.side, cut.block
    target, _, start, end, rows, ok = cut.tile(pack, index)
    s = [_load(s_ref, rows, side.in_s(at, size, target), _mask(ok, None)) for at, size in cut.ranks]
    *y_ref, o_ref = refs

    def step(number: Array, carry: None) -> None:
        columns, inside = _columns(start + number * block.columns, block.columns, end, cut.whole)
        mask, total = _mask(ok, inside), jnp.zeros((block.rows, block.columns), F32)
        for ref in y_ref:
            total += _load(ref, rows, columns, mask).astype(F32)
        for (at, size), one in zip(cut.ranks, s, strict=True):
            total += product(one, _load(w_ref, side.ranks_of(pack, at, size), columns, _mask(None, inside)), 0)
        plt.store(o_ref.at[rows[:, None], columns[None, :]], total.astype(o_ref.dtype), mask=mask)

    lax.fori_loop(0, pl.cdiv(block.span, block.columns), step, None)


def glu(
    activation: str,
    parts: int,
    cut: Cut,
    pack: Array,
    index: Array,
    gate_up_ref: Any,
    dact_ref: Any,
    s_ref: Any,
    w_ref: Any,
    g_ref: Any,
    o_ref: Any,
) -> None:
    """Through act = activation(gate) * up: d = dact + s w; o = d(gate) | d(up) of d; g[part, ranks, columns] = s^T act.

    `parts` programs share the rows of a block of columns, part after part.
    The activation is computed in float32 and rounded before the product with up, as the forward does; d is not rounded.
    """
    side, block, dtype = cut.side, cut.block, o_ref.dtype
    part, index = (f(index, jnp.int32(cut.strips)) for f in (lax.div, lax.rem))
    tiles = pl.cdiv(side.rows, block.rows)
    steps = pl.cdiv(tiles, parts)
    _, start, end = side.block(index, block.columns)
    columns, inside = _columns(start, block.columns, end, cut.whole)
    ups = columns + side.sizes[0]
    w = [_load(w_ref, side.ranks_of(pack, at, size), columns, _mask(None, inside)) for at, size in cut.ranks]

    def step(number: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        rows, ok = side.rows_of(pack, number * block.rows, block.rows)
        mask = _mask(ok, inside)
        gate, up = (_load(gate_up_ref, rows, at, mask).astype(F32) for at in (columns, ups))
        s = [_load(s_ref, rows, side.in_s(at, size, jnp.int32(0)), _mask(ok, None)) for at, size in cut.ranks]
        d = _load(dact_ref, rows, columns, mask).astype(F32)
        for one, other in zip(s, w, strict=True):
            d += product(one, other, 0)
        value, slope = value_and_slope(activation, gate)
        value = value.astype(dtype).astype(F32)
        plt.store(o_ref.at[rows[:, None], columns[None, :]], (d * up * slope).astype(dtype), mask=mask)
        plt.store(o_ref.at[rows[:, None], ups[None, :]], (d * value).astype(dtype), mask=mask)
        act = (value * up).astype(dtype)
        # The ranks first: act stays as it is in registers, transposing it took 30 us more of 85.
        return tuple(total + product(one, act, 0, contract_a=0) for total, one in zip(sums, s, strict=True))

    sums = tuple(jnp.zeros((size, block.columns), F32) for _, size in cut.ranks)
    last = tiles if parts == 1 else jnp.minimum((part + 1) * steps, tiles)
    sums = lax.fori_loop(0 if parts == 1 else part * steps, last, step, sums)
    for (at, size), total in zip(cut.ranks, sums, strict=True):
        ranks = side.ranks_of(pack, at, size)
        mask = None if inside is None else inside[None, :]
        plt.store(g_ref.at[part, ranks[:, None], columns[None, :]], total, mask=mask)
