"""The reference definition of the op: plain jnp in float32, row by row. Readable and slow."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.smlm.plan import RANK_PAGE, TILE, SmlmPlan


def row_pages(plan: SmlmPlan) -> Int32[Array, "T MP"]:
    """Adapter pages of every row; zeros for a row without adapter."""
    slot = jnp.asarray(plan.row_slot)
    pages = jnp.asarray(plan.tile_pages)[jnp.maximum(slot, 0) // TILE]
    return jnp.where((slot >= 0)[:, None], pages, 0)


def smlm_ref(
    x: Float[Array, "T in"],
    A: Float[Array, "P nR in"],
    B: Float[Array, "P R out"],
    plan: SmlmPlan,
    out_features: tuple[int, ...],
) -> Float32[Array, "T out"]:
    """The LoRA delta of every row, with the scaling folded into B.

    delta[t, cols_i] = sum over the row's pages p of (x[t] @ A[p, i*R:(i+1)*R].T) @ B[p, :, cols_i]
    (LoRA, arXiv 2106.09685, a rank-r product written as a sum over pages of R = 16 ranks).

    Args:
        x: Inputs.
        A: Pages of the n stacked targets.
        B: Pages, with the targets' columns side by side.
        plan: Work list; rows without adapter get 0.
        out_features: Columns of each target.
    """
    pages = row_pages(plan)
    used = pages > 0
    # Mask unused pages and rows without adapter before the product rather than after it: 0 * NaN is NaN.
    x32 = jnp.where(used[:, :1], x.astype(jnp.float32), 0.0)
    A32 = jnp.where(used[:, :, None, None], A.astype(jnp.float32)[pages], 0.0)
    B32 = jnp.where(used[:, :, None, None], B.astype(jnp.float32)[pages], 0.0)
    S = jnp.einsum("ti,tmri->tmr", x32, A32, precision=jax.lax.Precision.HIGHEST)
    deltas, start = [], 0
    for i, size in enumerate(out_features):
        S_i, B_i = S[:, :, i * RANK_PAGE : (i + 1) * RANK_PAGE], B32[:, :, :, start : start + size]
        deltas.append(jnp.einsum("tmr,tmro->to", S_i, B_i, precision=jax.lax.Precision.HIGHEST))
        start += size
    return jnp.concatenate(deltas, axis=1)
