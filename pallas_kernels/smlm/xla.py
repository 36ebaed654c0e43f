"""The op in plain XLA, batched over tiles: the default without a GPU, and the bit-exact path for f32 tests."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.smlm.plan import RANK_PAGE, TILE, SmlmPlan


@functools.partial(jax.jit, static_argnames=("out_features", "S_rows"))
def smlm_xla(
    x: Float[Array, "T in"],
    A: Float[Array, "P nR in"],
    B: Float[Array, "P R out"],
    plan: SmlmPlan,
    out_features: tuple[int, ...],
    y: Float[Array, "T out"] | None,
    S_rows: int = 0,
) -> tuple[Float[Array, "T out"], Float[Array, "K n MP R"] | None]:
    """y plus the delta (or the delta alone), by tiles of TILE rows.

    Every product is a batched GEMM over tiles of TILE rows, one page at a time, so that on the XLA CPU path a row's
    float32 bits do not depend on its neighbours, its position in a tile, or the number of tiles or pages.

    Args:
        x: Inputs.
        A: Pages of the n stacked targets.
        B: Pages, with the targets' columns side by side.
        plan: Work list; rows without adapter keep y, or get 0.
        out_features: Columns of each target.
        y: Added to the delta, or None.
        S_rows: K; if > 0, S = x A^T of the first K rows is returned as well.

    Returns:
        An array of y's (or x's) dtype, accumulated in float32. S has x's dtype and is 0 for absent pages.
    """
    row, length = jnp.asarray(plan.tile_row), jnp.asarray(plan.tile_len)
    pages, slot = jnp.asarray(plan.tile_pages), jnp.asarray(plan.row_slot)
    offset = jnp.arange(TILE, dtype=jnp.int32)
    rows = jnp.minimum(row[:, None] + offset[None, :], x.shape[0] - 1)
    x_tiles = jnp.where((offset[None, :] < length[:, None])[..., None], x[rows], jnp.zeros((), x.dtype))
    delta, S = None, []
    for m in range(pages.shape[1]):
        used = (pages[:, m] > 0)[:, None, None]
        S_m, part = _page_delta_if(used.any(), x_tiles, A, B, pages[:, m], out_features)
        # Skip absent pages rather than adding zeros, so that the bits do not depend on MP.
        delta = part if delta is None else jnp.where(used, delta + part, delta)
        S.append(jnp.where(used, S_m, jnp.zeros((), S_m.dtype)))
    flat, has = delta.reshape(-1, delta.shape[-1])[jnp.maximum(slot, 0)], (slot >= 0)[:, None]
    if y is None:
        out = jnp.where(has, flat, 0.0).astype(x.dtype)
    else:
        out = jnp.where(has, (y.astype(jnp.float32) + flat).astype(y.dtype), y)
    return out, _first_rows(S, slot[:S_rows], len(out_features)) if S_rows else None


def _first_rows(S: list[Array], slot: Int32[Array, " K"], targets: int) -> Float[Array, "K n MP R"]:
    """S of the rows in these slots, from each page's S by tile."""
    by_page = [one.reshape(-1, targets, RANK_PAGE)[jnp.maximum(slot, 0)] for one in S]
    stacked = jnp.stack(by_page, axis=2)
    return jnp.where((slot >= 0)[:, None, None, None], stacked, jnp.zeros((), stacked.dtype))


def _page_delta_if(
    any_used: Bool[Array, ""],
    x: Float[Array, "NT M in"],
    A: Float[Array, "P nR in"],
    B: Float[Array, "P R out"],
    pages: Int32[Array, " NT"],
    out_features: tuple[int, ...],
) -> tuple[Float[Array, "NT M nR"], Float[Array, "NT M out"]]:
    """`_page_delta` of these pages, or zeros where no tile has one: a step of the base alone gathers no weights."""

    def compute() -> tuple[Array, Array]:
        return _page_delta(x, A[pages], B[pages], out_features)

    def skip() -> tuple[Array, Array]:
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(compute))

    return jax.lax.cond(any_used, compute, skip)


def _page_delta(
    x: Float[Array, "NT M in"],
    A: Float[Array, "NT nR in"],
    B: Float[Array, "NT R out"],
    out_features: tuple[int, ...],
) -> tuple[Float[Array, "NT M nR"], Float[Array, "NT M out"]]:
    """S for one page of every tile, rounded to the operands' dtype, and its delta in float32."""
    S = jnp.einsum("tmi,tri->tmr", x, A, preferred_element_type=jnp.float32).astype(B.dtype)
    deltas, start = [], 0
    for i, size in enumerate(out_features):
        S_i, B_i = S[:, :, i * RANK_PAGE : (i + 1) * RANK_PAGE], B[:, :, start : start + size]
        deltas.append(jnp.einsum("tmr,tro->tmo", S_i, B_i, preferred_element_type=jnp.float32))
        start += size
    return S, jnp.concatenate(deltas, axis=-1)
