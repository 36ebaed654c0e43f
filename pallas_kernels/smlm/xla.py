"""The op in plain XLA, batched over tiles: the default off the GPU, and the bit-exact path of f32 tests."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.smlm.plan import RANK_PAGE, TILE, SmlmPlan


@functools.partial(jax.jit, static_argnames="out_features")
def smlm_xla(
    x: Float[Array, "T in"],
    A: Float[Array, "P nR in"],
    B: Float[Array, "P R out"],
    plan: SmlmPlan,
    out_features: tuple[int, ...],
    y: Float[Array, "T out"] | None,
) -> Float[Array, "T out"]:
    """y plus the delta (or the delta), by tiles of TILE rows.

    Every product is a batched GEMM of TILE rows of one adapter, one page at a time, so on the XLA CPU path a
    row's float32 bits do not depend on its neighbours, its place in a tile, or the number of tiles or pages.

    Args:
        x: Inputs.
        A: Pages of the n stacked targets.
        B: Pages, columns of the targets side by side.
        plan: Work list; rows without adapter keep y, or get 0.
        out_features: Columns of each target.
        y: What the delta is added to, or None.

    Returns:
        An array of y's (or x's) dtype; sums are float32.
    """
    row, length = jnp.asarray(plan.tile_row), jnp.asarray(plan.tile_len)
    pages, slot = jnp.asarray(plan.tile_pages), jnp.asarray(plan.row_slot)
    offset = jnp.arange(TILE, dtype=jnp.int32)
    rows = jnp.minimum(row[:, None] + offset[None, :], x.shape[0] - 1)
    x_tiles = jnp.where((offset[None, :] < length[:, None])[..., None], x[rows], jnp.zeros((), x.dtype))
    delta = None
    for m in range(pages.shape[1]):
        part = _page_delta(x_tiles, A[pages[:, m]], B[pages[:, m]], out_features)
        # An absent page adds nothing, rather than zeros: the bits must not depend on MP.
        delta = part if delta is None else jnp.where((pages[:, m] > 0)[:, None, None], delta + part, delta)
    flat = delta.reshape(-1, delta.shape[-1])[jnp.maximum(slot, 0)]
    has = (slot >= 0)[:, None]
    if y is None:
        return jnp.where(has, flat, 0.0).astype(x.dtype)
    return jnp.where(has, (y.astype(jnp.float32) + flat).astype(y.dtype), y)


def _page_delta(
    x: Float[Array, "NT M in"],
    A: Float[Array, "NT nR in"],
    B: Float[Array, "NT R out"],
    out_features: tuple[int, ...],
) -> Float[Array, "NT M out"]:
    """Delta of one page of every tile, float32."""
    S = jnp.einsum("tmi,tri->tmr", x, A, preferred_element_type=jnp.float32).astype(B.dtype)
    deltas, start = [], 0
    for i, size in enumerate(out_features):
        S_i, B_i = S[:, :, i * RANK_PAGE : (i + 1) * RANK_PAGE], B[:, :, start : start + size]
        deltas.append(jnp.einsum("tmr,tro->tmo", S_i, B_i, preferred_element_type=jnp.float32))
        start += size
    return jnp.concatenate(deltas, axis=-1)
