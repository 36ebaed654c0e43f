"""The inputs of one Triton program: static sizes, a tile of rows, a group of pages."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.common.blocks import column_block
from pallas_kernels.smlm.plan import RANK_PAGE
from pallas_kernels.smlm.tuning import SmlmConfig, num_spans


@dataclass(frozen=True)
class CallSizes:
    """Static sizes of one call."""

    rows: int  # rows of a tile
    max_tiles: int
    max_pages: int
    group: int  # pages handled by one product
    branch: bool
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
    ) -> "CallSizes":
        size, (tiles, pages) = x.shape[1], tile_pages.shape
        spans = num_spans(size)
        span = 16 * math.ceil(size / spans / 16)
        return cls(
            rows=config.tile_rows,
            max_tiles=tiles,
            max_pages=pages,
            group=min(pl.next_power_of_2(pages), config.group),
            branch=config.branch,
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
    def ranks(self) -> int:
        """Columns of h and S: the ranks of all targets."""
        return self.targets * self.max_pages * RANK_PAGE

    @property
    def blocks(self) -> int:
        """Blocks of outputs; none straddles two targets."""
        return sum(pl.cdiv(size, self.block_n) for size in self.out_features)

    @property
    def whole_blocks(self) -> bool:
        return all(size % self.block_n == 0 for size in self.out_features)

    def block(self, index: Array) -> tuple[Array, Array, Array]:
        """(target, columns [1, block_n], which of them belong to the target) of a block of outputs."""
        return column_block(index, self.out_features, self.block_n)


@dataclass
class Group:
    """Pages handled by one product, as vectors over their ranks."""

    page: Array
    rank: Array  # rank within its page
    slot: Array  # rank among all max_pages * 16 ranks of the tile
    used: Array

    @classmethod
    def of(cls, first: Array | int, pages: list[Array | int]) -> "Group":
        j = jnp.arange(len(pages) * RANK_PAGE, dtype=jnp.int32)
        page = jnp.zeros_like(j)
        for q, one in enumerate(pages):
            page = jnp.where(lax.div(j, jnp.int32(RANK_PAGE)) == q, one, page)
        return cls(page, lax.rem(j, jnp.int32(RANK_PAGE)), first * RANK_PAGE + j, page > 0)

    @property
    def ranks(self) -> int:
        return self.page.shape[0]


@dataclass
class Tile:
    """Rows and pages of a tile."""

    sizes: CallSizes
    number: Array  # scalar
    length: Array  # scalar
    rows: Array  # [rows, 1]
    ok: Array  # [rows, 1]
    pages: list[Array]  # scalars
    page: Callable[[Array], Array]

    @classmethod
    def load(cls, sizes: CallSizes, tile: Array, row_ref: Any, len_ref: Any, pages_ref: Any) -> "Tile":
        offset = jnp.arange(sizes.rows, dtype=jnp.int32)[:, None]
        length = len_ref[tile]
        # Rows beyond the tile keep distinct indices: masked lanes of a store must not collide with others.
        rows = row_ref[tile] + offset

        def page(m: Array) -> Array:
            return jnp.where(m < sizes.max_pages, pages_ref[tile, jnp.minimum(m, sizes.max_pages - 1)], 0)

        pages = [pages_ref[tile, m] for m in range(sizes.max_pages)]
        return cls(sizes, tile, length, rows, offset < length, pages, page)

    def for_page_groups(self, do: Callable[[Group, Any], Any], carry: Any) -> Any:
        """Folds `do` over groups of the pages that the tile uses.

        With `branch`, a tile with one page uses products of 16 ranks regardless of max_pages; others loop up to their
        last used page.
        """
        sizes, pages = self.sizes, self.pages

        def one(carry: Any) -> Any:
            return do(Group.of(0, pages[:1]), carry)

        def several(carry: Any) -> Any:
            if sizes.max_pages <= sizes.group:
                return do(Group.of(0, pages + [0] * (sizes.group - sizes.max_pages)), carry)
            count = sum((page > 0).astype(jnp.int32) for page in pages)

            def body(number: Array, carry: Any) -> Any:
                group = [self.page(number * sizes.group + q) for q in range(sizes.group)]
                return do(Group.of(number * sizes.group, group), carry)

            return lax.fori_loop(0, lax.div(count + (sizes.group - 1), jnp.int32(sizes.group)), body, carry)

        if sizes.max_pages == 1:
            return one(carry)
        return lax.cond(pages[1] > 0, several, one, carry) if sizes.branch else several(carry)
