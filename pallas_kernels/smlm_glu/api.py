"""The public op: validation, and the choice between fused and unfused implementations."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.common.activation import KERNEL_ACTIVATIONS, check_activation, gated
from pallas_kernels.common.checks import check_rank
from pallas_kernels.common.implementation import choose
from pallas_kernels.smlm.checks import check_arrays, check_plan
from pallas_kernels.smlm.delta import delta_beside
from pallas_kernels.smlm.forward import forward
from pallas_kernels.smlm.plan import SmlmPlan
from pallas_kernels.smlm_glu.triton import smlm_glu_triton


def smlm_glu(
    x: Float[Array, "T in"],
    A: Float[Array, "P RR in"],
    B: Float[Array, "P R FF"],
    plan: SmlmPlan,
    *,
    y: Float[Array, "T FF"],
    activation: str,
    keep: bool = True,
    implementation: str | None = None,
) -> tuple[Float[Array, "T F"], Float[Array, "K FF"] | None, Float[Array, "K n MP R"] | None, SmlmPlan]:
    """act(gate) * up of every row, where [gate | up] is y plus the delta of `smlm`.

    gate and up are rounded to y's dtype as in `smlm_fwd`; act(gate), computed in float32, and the product are rounded
    as well. With many rows, and if kernels support the activation, one kernel fuses the sum and the activation;
    otherwise `smlm_fwd` is followed by the activation. Not differentiable; for the backward use `smlm_bwd` with `glu`.

    Args:
        x: Inputs, bfloat16, float16 or float32.
        A: Pages of gate and up, x's dtype.
        B: Pages, with the columns of gate and up side by side, x's dtype.
        plan: From `build_plan`.
        y: [gate | up] of the base, x's dtype.
        activation: A key of `common.activation.ACTIVATIONS`.
        keep: Whether to return gate and up of the train rows.
        implementation: "xla", "triton", or None for triton on a GPU and xla elsewhere.

    Returns:
        act(gate) * up of all rows.
        [gate | up] of the K train rows; None without train rows or without `keep`.
        S = x A^T of the train rows, and the plan for the next call, as from `smlm_fwd`.

    Raises:
        ValueError: shapes disagree or are not multiples of 16, or the activation or implementation is unknown.
        TypeError: dtypes disagree.
    """
    check_activation(activation)
    check_rank("y", y, 2)
    half, choice = y.shape[1] // 2, choose(implementation)
    check_arrays(x, A, B, y, (half, half))
    check_plan(plan, x.shape[0])
    rows, keep = plan.train_rows, bool(keep and plan.train_rows)
    fused = choice == "triton" and activation in KERNEL_ACTIVATIONS
    if not fused or delta_beside(x.shape[0], plan, choice):
        gate_up, S, plan = forward(x, A, B, plan, (half, half), y, choice, rows)
        return gated(activation, gate_up), gate_up[:rows] if keep else None, S, plan
    plan = jax.tree.map(jnp.asarray, plan)
    out, gate_up, S, counters = smlm_glu_triton(x, A, B, plan, y, activation, rows, keep)
    return out, gate_up, S, replace(plan, counters=counters)
