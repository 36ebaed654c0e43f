"""The runs of a plan: maximal ranges of adjacent rows with the same adapter, each with its own gradient sum."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.smlm.plan import SmlmPlan


class Runs(NamedTuple):
    """Runs in row order. G is static: the smallest number that always suffices for the plan's capacities.

    Attributes:
        row: First row of each run.
        length: Number of rows of each run; 0 marks an unused entry.
        pages: Pages of each run's adapter, used entries first, 0 = none.
        of_tile: The run of each tile of TILE rows; G for unused tiles.
    """

    row: Int32[Array, " G"]
    length: Int32[Array, " G"]
    pages: Int32[Array, "G MP"]
    of_tile: Int32[Array, " NT"]


def runs_of(plan: SmlmPlan) -> Runs:
    """Merges consecutive tiles with equal pages into runs, on the device.

    Every run has at least one tile and one wide tile, so the smaller of the two capacities bounds their number.
    """
    row, length, pages = (jnp.asarray(a) for a in (plan.tile_row, plan.tile_len, plan.tile_pages))
    runs, used = min(plan.tile_row.shape[0], plan.wide_row.shape[0]), length > 0
    before, pages_before = row[:-1] + length[:-1], pages[:-1]
    continues = (before == row[1:]) & (pages_before == pages[1:]).all(axis=1)
    first = used & jnp.concatenate([jnp.ones((1,), bool), ~continues])
    of_tile = jnp.where(used, jnp.cumsum(first, dtype=jnp.int32) - 1, runs)
    # Index G is out of range and therefore dropped.
    to = jnp.where(first, of_tile, runs)

    def at_first(a: Array) -> Array:
        return jnp.zeros((runs, *a.shape[1:]), jnp.int32).at[to].set(a, mode="drop")

    lengths = jnp.zeros((runs,), jnp.int32).at[of_tile].add(length, mode="drop")
    return Runs(at_first(row), lengths, at_first(pages), of_tile)
