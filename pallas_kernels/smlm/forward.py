"""The forward of SMLM: the delta of every row, and S = x A^T of the train rows."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.common.implementation import choose
from pallas_kernels.smlm.checks import check_arrays, check_plan
from pallas_kernels.smlm.delta import add_delta, delta_beside
from pallas_kernels.smlm.delta_triton import smlm_delta_triton
from pallas_kernels.smlm.plan import SmlmPlan
from pallas_kernels.smlm.triton import smlm_triton
from pallas_kernels.smlm.xla import smlm_xla


def smlm_fwd(
    x: Float[Array, "T in"],
    A: Float[Array, "P nR in"],
    B: Float[Array, "P R out"],
    plan: SmlmPlan,
    *,
    out_features: tuple[int, ...],
    y: Float[Array, "T out"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "T out"], Float[Array, "K n MP R"] | None, SmlmPlan]:
    """The forward of `smlm`, which also returns the residuals for its backward; not differentiable itself.

    With few rows and no train rows, kernels compute the delta concurrently with y and round it to y's dtype before the
    sum. Otherwise the sum is rounded once, and written in place of y if XLA may reuse its buffer.

    Args:
        x, A, B, plan, out_features, y, implementation: As for `smlm`.

    Returns:
        y plus the delta, or the delta alone, in x's dtype.
        S = x A^T of the plan's K train rows in x's dtype, by target and page, 0 for absent pages, as input of
        `smlm_bwd`; None without train rows.
        The plan to use for the next call, whose counters are zero again.

    Raises:
        ValueError, TypeError: as for `smlm`.
    """
    out_features = tuple(int(size) for size in out_features)
    check_arrays(x, A, B, y, out_features)
    check_plan(plan, x.shape[0])
    return forward(x, A, B, plan, out_features, y, choose(implementation), plan.train_rows)


def forward(
    x: Float[Array, "T in"],
    A: Float[Array, "P nR in"],
    B: Float[Array, "P R out"],
    plan: SmlmPlan,
    out_features: tuple[int, ...],
    y: Float[Array, "T out"] | None,
    implementation: str,
    S_rows: int,
) -> tuple[Float[Array, "T out"], Float[Array, "K n MP R"] | None, SmlmPlan]:
    """`smlm_fwd` without its checks, returning S of the first S_rows rows regardless of the plan's packs."""
    plan = jax.tree.map(jnp.asarray, plan)
    if implementation == "xla":
        return *smlm_xla(x, A, B, plan, out_features, y, S_rows), plan
    if y is not None and not S_rows and delta_beside(x.shape[0], plan, implementation):
        return add_delta(y, smlm_delta_triton(x, A, B, plan, out_features), plan), None, plan
    out, S, counters = smlm_triton(x, A, B, plan, out_features, y, S_rows=S_rows)
    return out, S, replace(plan, counters=counters)
