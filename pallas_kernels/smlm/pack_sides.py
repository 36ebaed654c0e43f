"""Layout of the rows and pages of packs and runs, and how work on them is split into programs.

The rows of all packs are concatenated, and so are their pages: pack g has rows g*L.. of x and dY, rows g*R.. of A
(R = pages * targets * 16 ranks, in page order, as in dS) and g*RT.. of B (RT = pages * 16 ranks, shared by the targets'
columns). A run's first row, length and pages are read from a list; its pages can be anywhere in the pools, and its
gradients are laid out like a pack's. S has the RT ranks of each target in turn. Ranks are processed in chunks whose
sizes are powers of two.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.common.blocks import block_of
from pallas_kernels.smlm.pack_tuning import MAX_RANKS, Block

Chunks = tuple[tuple[int, int], ...]  # (first rank, ranks)


@dataclass(frozen=True)
class Side:
    """A tall operand of packs, x or dY, and the ranks that its columns are contracted with.

    Attributes:
        packs: G.
        rows: L, rows of a pack.
        sizes: Columns of each target: (in,) for x, out_features for dY.
        ranks: Ranks per column: R for x, RT for dY.
    """

    packs: int
    rows: int
    sizes: tuple[int, ...]
    ranks: int

    @property
    def chunks(self) -> Chunks:
        """All ranks in chunks whose sizes are powers of two, so that no lane is wasted."""
        found, start = [], 0
        while start < self.ranks:
            size = min(MAX_RANKS, 1 << ((self.ranks - start).bit_length() - 1))
            found.append((start, size))
            start += size
        return tuple(found)

    @property
    def windows(self) -> list[Chunks]:
        """The chunks in groups of at most MAX_RANKS ranks, the limit for one program's sums."""
        found: list[Chunks] = []
        for chunk in self.chunks:
            if found and sum(size for _, size in found[-1]) + chunk[1] <= MAX_RANKS:
                found[-1] = (*found[-1], chunk)
            else:
                found.append((chunk,))
        return found

    def blocks(self, width: int) -> int:
        """Number of blocks of `width` columns; no block straddles two targets."""
        return sum(pl.cdiv(size, width) for size in self.sizes)

    def block(self, index: Array, width: int) -> tuple[Array, Array, Array]:
        """(target, first column, end of the target's columns) for a block."""
        return block_of(index, self.sizes, width)

    def in_s(self, start: int, size: int, target: Array) -> Array:
        """Columns of a target's ranks start.. in S, or in dS for the single target of x."""
        return target * self.ranks + start + jnp.arange(size, dtype=jnp.int32)

    def lists(self) -> tuple[str, ...]:
        """Names of the list operands that `place` reads."""
        return ()

    def place(self, number: Array, refs: dict[str, Any]) -> "Pack":
        """The pack with this number."""
        return Pack(self, number)


@dataclass(frozen=True)
class Pack:
    """Location of a pack's rows and pages; everything but the number is static."""

    side: Side
    number: Array

    def when(self, ranks: Chunks, do: Callable[[], None]) -> None:
        """Calls `do` if there is work for these ranks."""
        do()

    def steps(self, count: int) -> int | Array:
        """Number of blocks of `count` rows."""
        return pl.cdiv(self.side.rows, count)

    def rows(self, first: Array, count: int) -> tuple[Array, Array | None]:
        """Rows first.., and the mask of those that belong to the pack (None: all)."""
        offset = first + jnp.arange(count, dtype=jnp.int32)
        return self.number * self.side.rows + offset, None if self.side.rows % count == 0 else offset < self.side.rows

    def used(self, start: int, size: int) -> Array | None:
        """Mask of the ranks start.. that exist (None: all; those of absent pages are zeros)."""
        return None

    def pages(self, start: int, size: int) -> Array:
        """Rows of its pages for ranks start.."""
        return self.sums(start, size)

    def sums(self, start: int, size: int) -> Array:
        """Rows of its pages' gradients for ranks start.."""
        return self.number * self.side.ranks + start + jnp.arange(size, dtype=jnp.int32)


@dataclass(frozen=True)
class ListedSide(Side):
    """A tall operand whose runs, or tiles of runs, are given by lists.

    Attributes:
        packs: Entries in the lists.
        rows: Rows of the longest entry that is split into tiles.
        page_ranks: Ranks of a page.
        max_pages: MP.
        listed: Names of the lists: first rows, lengths and pages.
        bare: Whether entries without pages need work too.
    """

    page_ranks: int
    max_pages: int
    listed: tuple[str, str, str]
    bare: bool = False

    def lists(self) -> tuple[str, ...]:
        return self.listed

    def place(self, number: Array, refs: dict[str, Any]) -> "Run":
        """The entry with this number."""
        row, length, pages = (refs[name] for name in self.listed)
        own = tuple(pages[number, m] for m in range(self.max_pages))
        return Run(self, number, row[number], length[number], own)


@dataclass(frozen=True)
class Run(Pack):
    """Location of the rows and pages of a run or of a tile of one. Loads of anything else are masked."""

    side: ListedSide
    first: Array
    length: Array
    own: tuple[Array, ...]

    def when(self, ranks: Chunks, do: Callable[[], None]) -> None:
        wanted = self.length > 0
        if not self.side.bare:  # used pages come first: if the first rank's page is absent, so are the rest
            wanted &= self.own[ranks[0][0] // self.side.page_ranks] > 0
        pl.when(wanted)(do)

    def steps(self, count: int) -> int | Array:
        return lax.div(self.length + (count - 1), jnp.int32(count))

    def rows(self, first: Array, count: int) -> tuple[Array, Array | None]:
        offset = first + jnp.arange(count, dtype=jnp.int32)
        return self.first + offset, offset < self.length

    def used(self, start: int, size: int) -> Array | None:
        return self._page(start, size) > 0

    def pages(self, start: int, size: int) -> Array:
        ranks = start + jnp.arange(size, dtype=jnp.int32)
        return self._page(start, size) * self.side.page_ranks + lax.rem(ranks, jnp.int32(self.side.page_ranks))

    def _page(self, start: int, size: int) -> Array:
        """The page of each of the ranks start.."""
        height = self.side.page_ranks
        number = lax.div(start + jnp.arange(size, dtype=jnp.int32), jnp.int32(height))
        page = jnp.zeros((size,), jnp.int32)
        for m in range(start // height, (start + size - 1) // height + 1):
            page = jnp.where(number == m, self.own[m], page)
        return page


@dataclass(frozen=True)
class Cut:
    """How a tall operand is split for one kind of work, and the ranks that a program handles."""

    side: Side
    block: Block
    ranks: Chunks

    @property
    def strips(self) -> int:
        """Programs per pack if each loops over all rows."""
        return self.side.blocks(self.block.columns)

    @property
    def tiles(self) -> int:
        """Programs per pack if each handles a tile of rows and a span of columns."""
        return pl.cdiv(self.side.rows, self.block.rows) * self.side.blocks(self.block.span)

    def tile(self, place: Pack, index: Array) -> tuple[Any, ...]:
        """(target, part, first column, end, rows, row mask) for a tile; rows vary fastest."""
        tiles, span = jnp.int32(pl.cdiv(self.side.rows, self.block.rows)), self.block.span
        part, tile = lax.div(index, tiles), lax.rem(index, tiles)
        target, start, end = self.side.block(part, span)
        rows, ok = place.rows(tile * self.block.rows, self.block.rows)
        return target, part, start, jnp.minimum(end, start + span), rows, ok

    @property
    def whole(self) -> bool:
        """Whether every block of columns is full."""
        block = self.block
        return block.span % block.columns == 0 and all(
            size % (block.span or block.columns) == 0 for size in self.side.sizes
        )
