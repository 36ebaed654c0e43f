"""The work list of one step, which maps rows to adapters; built once on the host and shared by all layers."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

TILE = 16  # rows of a tile: the smallest M of a tensor core instruction, and one prefill block
WIDE = 64  # rows of a wide tile, which reads A and B once for four tiles
RANK_PAGE = 16  # ranks of one adapter page

Segment = tuple[int, int, tuple[int, ...]]  # first row, rows, adapter pages
IntArray = np.ndarray | jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SmlmPlan:
    """A step's rows split into tiles of one adapter each; a pytree of int32 arrays, numpy or jax.

    The rows are listed twice: in tiles of TILE rows (for XLA, and for the kernels at decode) and in wide tiles of WIDE
    rows (for the kernels with many rows). Wide tiles of adapters are followed by those of rows without one, so that
    every row of the step is in one wide tile. NT, NW and MP are static; entries beyond `used` are 0.

    The leading `train_rows` rows are packs: equally long, contiguous, each with one adapter. `smlm_fwd` returns S for
    these rows, and `smlm_bwd` differentiates them.

    Attributes:
        tile_row: First row of each tile.
        tile_len: Rows of each tile, at most TILE; 0 marks an unused tile.
        tile_pages: Adapter pages of each tile, used entries first, 0 = none.
        row_slot: Per row, tile * TILE + offset in the tile; -1 without adapter.
        wide_row: First row of each wide tile.
        wide_len: Rows of each wide tile, at most WIDE; 0 marks an unused one.
        wide_pages: Adapter pages of each wide tile; all 0 for rows without adapter.
        used: Number of used tiles, of wide tiles with adapters, and of all wide tiles.
        counters: Scratch of the kernels, zero before and after every call. A kernel that uses it donates the array and
            returns it in the plan for the next call; reusing the old plan makes XLA copy it.
        pack_pages: Adapter pages of each pack, used entries first, 0 = none; G is 0 without train rows.
        pack_rows: L, rows of each pack; static.
    """

    tile_row: Int32[IntArray, " NT"]
    tile_len: Int32[IntArray, " NT"]
    tile_pages: Int32[IntArray, "NT MP"]
    row_slot: Int32[IntArray, " T"]
    wide_row: Int32[IntArray, " NW"]
    wide_len: Int32[IntArray, " NW"]
    wide_pages: Int32[IntArray, "NW MP"]
    used: Int32[IntArray, " 3"]
    counters: Int32[IntArray, " C"]
    pack_pages: Int32[IntArray, "G GP"]
    pack_rows: int = field(default=0, metadata={"static": True})

    @property
    def train_rows(self) -> int:
        """Number of leading rows that are differentiated: G * L."""
        return self.pack_pages.shape[0] * self.pack_rows


def num_tiles_bound(rows_per_part: Sequence[int], runs_per_part: Sequence[int], height: int = TILE) -> int:
    """Number of tiles that suffices for any step whose parts have at most so many rows in at most so many runs.

    A run is a maximal range of adjacent rows with the same adapter. A part of R rows in D runs needs at most
    sum ceil(r_i / height) <= D + floor((R - D) / height) tiles, attained when all but one run have one row.

    Args:
        rows_per_part: R of each part (train, score, prefill, decode), >= 0.
        runs_per_part: D of each part, >= 0; more than R counts as R.
        height: Rows of a tile: TILE for num_tiles, WIDE for num_wide.

    Returns:
        The sum over parts, at least 1 so that plan arrays are never empty.

    Raises:
        ValueError: the two differ in length, or a number is negative.
    """
    if len(rows_per_part) != len(runs_per_part):
        raise ValueError(f"runs_per_part: got {len(runs_per_part)} parts, expected {len(rows_per_part)}")
    total = 0
    for rows, runs in zip(rows_per_part, runs_per_part, strict=True):
        if rows < 0 or runs < 0:
            raise ValueError(f"rows_per_part, runs_per_part: got {rows}, {runs}, expected both >= 0")
        runs = min(rows, runs)
        total += runs + (rows - runs) // height if runs else 0
    return max(1, total)


def num_wide_bound(rows_per_part: Sequence[int], runs_per_part: Sequence[int]) -> int:
    """Number of wide tiles that suffices, counting rows without adapter between and around all runs.

    Args:
        rows_per_part: As for `num_tiles_bound`.
        runs_per_part: As for `num_tiles_bound`; runs with adapters only.
    """
    return num_tiles_bound(rows_per_part, [2 * runs + 1 for runs in runs_per_part], WIDE)


@functools.lru_cache(maxsize=256)  # asked for in every step
def plan_shapes(num_rows: int, num_tiles: int, max_pages: int, num_wide: int | None = None) -> SmlmPlan:
    """The plan of `build_plan` as jax.ShapeDtypeStruct leaves, to compile ahead of time.

    Args:
        num_rows: T, rows of the step.
        num_tiles: NT, capacity in tiles.
        max_pages: MP, maximum pages of one adapter.
        num_wide: NW, capacity in wide tiles; by default `num_wide_bound` of num_tiles runs, which always suffices.
    """
    num_wide = num_wide_bound([num_rows], [num_tiles]) if num_wide is None else num_wide
    row, pages, wide, wide_pages = (num_tiles,), (num_tiles, max_pages), (num_wide,), (num_wide, max_pages)
    counters = (max(num_tiles, num_wide),)
    shapes = (row, row, pages, (num_rows,), wide, wide, wide_pages, (3,), counters, (0, max_pages))
    return SmlmPlan(*(jax.ShapeDtypeStruct(shape, np.int32) for shape in shapes))


def build_plan(
    segments: Sequence[Segment],
    num_rows: int,
    num_tiles: int,
    max_pages: int,
    num_wide: int | None = None,
) -> SmlmPlan:
    """Splits segments into tiles, on the host.

    Adjacent segments with the same pages are merged first, so that decode rows of one adapter share tiles.

    Args:
        segments: (first row, rows, pages) each; rows in no segment, or in one without pages, have no adapter.
        num_rows: T, rows of the step.
        num_tiles: NT, capacity in tiles; `num_tiles_bound` always suffices.
        max_pages: MP, maximum pages of one adapter.
        num_wide: NW, capacity in wide tiles; the default always suffices, a smaller one saves idle programs.

    Returns:
        The plan, in numpy, without train rows (set `pack_pages` and `pack_rows` with `dataclasses.replace`).

    Raises:
        ValueError: a segment is outside [0, num_rows), overlaps another, has a repeated or invalid page or more than
            max_pages of them, or the segments need more tiles than the capacity. The message gives both values.
    """
    for name, value in (("num_rows", num_rows), ("num_tiles", num_tiles), ("max_pages", max_pages)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected >= 1")
    shapes = plan_shapes(num_rows, num_tiles, max_pages, num_wide)
    plan = jax.tree.map(lambda s: np.zeros(s.shape, np.int32), shapes)
    plan.row_slot[:] = -1
    runs = _runs(segments, num_rows, max_pages)
    bare = _gaps(runs, num_rows)
    for name, height, listed, capacity in (
        ("num_tiles", TILE, runs, num_tiles),
        ("num_wide", WIDE, runs + bare, plan.wide_row.shape[0]),
    ):
        needed = sum(-(-rows // height) for _, rows, _ in listed)
        if needed > capacity:
            raise ValueError(f"{name}: got {capacity}, expected at least {needed} for these segments")
    plan.used[0] = _fill(runs, TILE, plan.tile_row, plan.tile_len, plan.tile_pages, plan.row_slot)
    plan.used[1] = sum(-(-rows // WIDE) for _, rows, _ in runs)
    plan.used[2] = _fill(runs + bare, WIDE, plan.wide_row, plan.wide_len, plan.wide_pages, None)
    return plan


def pack_plan(pages: Int32[Array, "G MP"], rows: int) -> SmlmPlan:
    """A plan of packs only, G of `rows` rows each, for a backward inside jit.

    XLA removes the parts that are not used: `smlm_bwd` reads only `pack_pages`.

    Args:
        pages: Adapter pages of each pack, used entries first, 0 = none.
        rows: L, static.
    """
    pages, packs = jnp.asarray(pages, jnp.int32), pages.shape[0]
    has = pages[:, :1] > 0
    offset = jnp.arange(rows, dtype=jnp.int32)[None]
    tiles = [_pack_tiles(pages, rows, height) for height in (TILE, WIDE)]
    slot = jnp.arange(packs, dtype=jnp.int32)[:, None] * (TILE * math.ceil(rows / TILE)) + offset
    (tile_row, tile_len, tile_pages), (wide_row, wide_len, wide_pages) = tiles
    # A pack without adapter has no tiles, but it has wide tiles.
    tile_len = jnp.where(tile_pages[:, 0] > 0, tile_len, 0)
    counts = (tile_row.size, wide_row.size, wide_row.size)
    return SmlmPlan(
        tile_row=tile_row,
        tile_len=tile_len,
        tile_pages=tile_pages,
        row_slot=jnp.where(has, slot, -1).reshape(-1),
        wide_row=wide_row,
        wide_len=wide_len,
        wide_pages=wide_pages,
        used=jnp.asarray(counts, jnp.int32),
        counters=jnp.zeros(max(counts), jnp.int32),
        pack_pages=pages,
        pack_rows=rows,
    )


def _pack_tiles(pages: Array, rows: int, height: int) -> tuple[Array, Array, Array]:
    """First row, length and pages of the tiles of all packs, in order."""
    packs, count = pages.shape[0], math.ceil(rows / height)
    start = height * jnp.arange(count, dtype=jnp.int32)[None]
    row = jnp.arange(packs, dtype=jnp.int32)[:, None] * rows + start
    length = jnp.broadcast_to(jnp.minimum(rows - start, height), row.shape)
    return row.reshape(-1), length.reshape(-1), jnp.repeat(pages, count, axis=0)


def _gaps(runs: list[Segment], num_rows: int) -> list[Segment]:
    """The row ranges between runs, as segments without pages."""
    gaps, end = [], 0
    for first, rows, _ in [*runs, (num_rows, 0, ())]:
        if first > end:
            gaps.append((end, first - end, ()))
        end = first + rows
    return gaps


def _runs(segments: Sequence[Segment], num_rows: int, max_pages: int) -> list[Segment]:
    """Checks the segments; returns those with rows and pages, sorted, with equal neighbours merged."""
    kept: list[Segment] = []
    for number, (first, rows, pages) in enumerate(segments):
        name = f"segments[{number}]"
        if rows < 0 or first < 0 or first + rows > num_rows:
            end = first + rows
            raise ValueError(f"{name}: got rows {first} to {end}, expected within num_rows={num_rows}")
        if len(pages) > max_pages:
            raise ValueError(f"{name}: got {len(pages)} pages, expected at most max_pages={max_pages}")
        if any(page < 1 for page in pages) or len(set(pages)) != len(pages):
            raise ValueError(f"{name}: got pages {tuple(pages)}, expected distinct page numbers >= 1")
        if rows and len(pages):
            kept.append((int(first), int(rows), tuple(int(page) for page in pages)))
    kept.sort()
    joined: list[Segment] = []
    for first, rows, pages in kept:
        end = joined[-1][0] + joined[-1][1] if joined else 0
        if first < end:
            raise ValueError(f"segments: row {first} is in two segments, expected each row in at most one")
        if joined and first == end and pages == joined[-1][2]:
            joined[-1] = (joined[-1][0], joined[-1][1] + rows, pages)
        else:
            joined.append((first, rows, pages))
    return joined


def _fill(
    runs: list[Segment],
    height: int,
    row: np.ndarray,
    length: np.ndarray,
    pages: np.ndarray,
    slot: np.ndarray | None,
) -> int:
    """Writes tiles of `height` rows in the order of the runs; returns their number."""
    if not runs:
        return 0
    first, rows = (np.array([run[i] for run in runs]) for i in (0, 1))
    of_run = np.zeros((len(runs), pages.shape[1]), np.int32)
    for i, (_, _, run_pages) in enumerate(runs):
        of_run[i, : len(run_pages)] = run_pages
    run, within = _spread(-(-rows // height))
    here = slice(0, len(run))
    row[here] = first[run] + height * within
    length[here] = np.minimum(height, (first + rows)[run] - row[here])
    pages[here] = of_run[run]
    if slot is not None:
        tile = np.flatnonzero(within == 0)
        run, within = _spread(rows)
        slot[first[run] + within] = tile[run] * height + within
    return here.stop


def _spread(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For items in groups of these sizes, >= 1: the group of each item, and its index in the group."""
    group = np.repeat(np.arange(len(counts)), counts)
    return group, np.arange(len(group)) - np.repeat(np.cumsum(counts) - counts, counts)
