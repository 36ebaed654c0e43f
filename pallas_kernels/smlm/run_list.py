"""The runs of a plan: stretches of neighbouring rows of one adapter, whose gradients are one sum each."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.smlm.plan import SmlmPlan


class Runs(NamedTuple):
    """Runs in the order of their rows. G is static: the fewest that always suffice for the plan's capacities.

    Attributes:
        row: First row of each run.
        length: Its rows; 0 marks an unused entry.
        pages: Pages of its adapter, leading entries used, 0 = none.
        of_tile: Of each tile of TILE rows, the run that it belongs to; G of an unused tile.
    """

    row: Int32[Array, " G"]
    length: Int32[Array, " G"]
    pages: Int32[Array, "G MP"]
    of_tile: Int32[Array, " NT"]


def runs_of(plan: SmlmPlan) -> Runs:
    """Joins the tiles that continue each other with equal pages, on the device.

    Every run has a tile and a wide tile of its own, so there are at most as many as the smaller list holds.
    """
    row, length, pages = (jnp.asarray(a) for a in (plan.tile_row, plan.tile_len, plan.tile_pages))
    runs, used = min(plan.tile_row.shape[0], plan.wide_row.shape[0]), length > 0
    before, pages_before = row[:-1] + length[:-1], pages[:-1]
    continues = (before == row[1:]) & (pages_before == pages[1:]).all(axis=1)
    first = used & jnp.concatenate([jnp.ones((1,), bool), ~continues])
    of_tile = jnp.where(used, jnp.cumsum(first, dtype=jnp.int32) - 1, runs)
    # What is sent to G is dropped.
    to = jnp.where(first, of_tile, runs)

    def at_first(a: Array) -> Array:
        return jnp.zeros((runs, *a.shape[1:]), jnp.int32).at[to].set(a, mode="drop")

    lengths = jnp.zeros((runs,), jnp.int32).at[of_tile].add(length, mode="drop")
    return Runs(at_first(row), lengths, at_first(pages), of_tile)
