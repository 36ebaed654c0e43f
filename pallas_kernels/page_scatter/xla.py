"""The op in plain XLA: one scatter per group."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

MAX_UNROLLED = 16  # with more groups, a loop keeps the program small


def scatter_add_xla(
    ids: Int32[Array, "G MP"], pool: Float32[Array, "P r c"], delta: Float[Array, "G MP r c"]
) -> Float32[Array, "P r c"]:
    """`scatter_add_pages` for one pool."""

    def add(g: Array | int, pool: Array) -> Array:
        return pool.at[ids[g]].add(delta[g].astype(jnp.float32))

    if ids.shape[0] > MAX_UNROLLED:
        return lax.fori_loop(0, ids.shape[0], add, pool)
    for g in range(ids.shape[0]):
        pool = add(g, pool)
    return pool
