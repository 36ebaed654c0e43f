"""The public op `smlm`: the delta of every row, differentiable in x, A, B and y."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.common.implementation import choose
from pallas_kernels.page_scatter import scatter_add_pages
from pallas_kernels.smlm.backward import smlm_bwd
from pallas_kernels.smlm.checks import check_arrays, check_plan
from pallas_kernels.smlm.forward import forward
from pallas_kernels.smlm.plan import SmlmPlan
from pallas_kernels.smlm.runs import backward_runs


def smlm(
    x: Float[Array, "T in"],
    A: Float[Array, "P nR in"],
    B: Float[Array, "P R out"],
    plan: SmlmPlan,
    *,
    out_features: tuple[int, ...],
    y: Float[Array, "T out"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "T out"]:
    """Segmented multi-LoRA multiplication: adds the delta of every row, under its own adapter, to y.

    delta[t, cols_i] = sum over the row's pages p of (x[t] @ A[p, i*R:(i+1)*R].T) @ B[p, :, cols_i], R = 16,
    with scaling folded into B. Products take operands in the arrays' dtype (S = x A^T is rounded to it) and
    accumulate in float32, in an order that depends only on the input size; tiles are independent.

    A `jax.custom_vjp` of `smlm_fwd` and a backward by groups, which are packs (`smlm_bwd`) if the plan has packs only,
    else runs of rows of one adapter. Gradients of A and B are computed per group in float32, added in the order of the
    groups (`scatter_add_pages`) and cast to A's dtype. y is not kept for the backward.

    Args:
        x: Inputs, bfloat16, float16 or float32.
        A: Pages of the n stacked targets, x's dtype. Page 0 means none and is never read by the kernels.
        B: Pages, with the targets' columns side by side, x's dtype.
        plan: From `build_plan`; its page numbers are not checked on the device and must be below P.
        out_features: Columns of each target, multiples of 16; they sum to B's last dimension.
        y: Added to the delta, x's dtype. Under jit the kernels write in place if XLA may reuse its buffer (donate it,
            or let it be a temporary). If None, the result is the delta alone, zero for rows without adapter.
        implementation: "xla", "triton", or None for triton on a GPU and xla elsewhere.

    Returns:
        y plus the delta; rows without adapter equal y bit for bit. With few rows the kernels may round the delta
        before the sum (see `smlm_fwd`), unless the call is differentiated.

    Raises:
        ValueError: shapes disagree or are not multiples of 16, or the implementation is unknown.
        TypeError: dtypes disagree.
    """
    out_features = tuple(int(size) for size in out_features)
    check_arrays(x, A, B, y, out_features)
    check_plan(plan, x.shape[0])
    return _smlm(x, A, B, y, plan, out_features, choose(implementation))


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _smlm(
    x: Array,
    A: Array,
    B: Array,
    y: Array | None,
    plan: SmlmPlan,
    out_features: tuple[int, ...],
    implementation: str,
) -> Array:
    return forward(x, A, B, _without_packs(plan), out_features, y, implementation, 0)[0]


def _without_packs(plan: SmlmPlan) -> SmlmPlan:
    """The same plan without train rows."""
    return replace(plan, pack_pages=plan.pack_pages[:0], pack_rows=0)


def _forward_rule(
    x: Array,
    A: Array,
    B: Array,
    y: Array | None,
    plan: SmlmPlan,
    out_features: tuple[int, ...],
    implementation: str,
) -> tuple[Array, Any]:
    out, S, _ = forward(x, A, B, plan, out_features, y, implementation, x.shape[0])
    return out, (S, x, A, B, plan, None if y is None else ())


def _backward_rule(out_features: tuple[int, ...], implementation: str, kept: Any, dout: Array) -> tuple[Any, ...]:
    """dX in x's dtype, dA and dB in A's; the gradient of y is dout itself."""
    S, x, A, B, plan, has_y = kept
    dy = None if has_y is None else dout
    if S is None:  # no rows
        return jnp.zeros_like(x), jnp.zeros_like(A), jnp.zeros_like(B), dy, None
    options = {"out_features": out_features, "implementation": implementation}
    if plan.train_rows == x.shape[0]:
        (dx, *deltas), pages = smlm_bwd(S, x, A, B, plan, dout, **options), plan.pack_pages
    else:
        dx, *deltas, pages = backward_runs(S, x, A, B, plan, dout, **options)
    pools = [jnp.zeros(a.shape, jnp.float32) for a in (A, B)]
    added = scatter_add_pages(pools, pages, deltas, implementation=implementation)
    dA, dB = (pool.at[0].set(0).astype(a.dtype) for pool, a in zip(added, (A, B), strict=True))
    return dx, dA, dB, dy, None


_smlm.defvjp(_forward_rule, _backward_rule)
