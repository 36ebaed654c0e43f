"""The op in two halves, for few rows: the delta is computed beside the base GEMM, and added by whatever reads both.

`smlm` adds into y and so waits for it. At decode a base GEMM streams its weights and leaves room on every SM: the
delta needs only x, so a device that runs independent kernels at one time hides its launches behind the GEMM.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.smlm.api import _check_arrays, _check_plan, _choose
from pallas_kernels.smlm.delta_triton import smlm_delta_triton
from pallas_kernels.smlm.plan import SmlmPlan
from pallas_kernels.smlm.xla import smlm_xla


def smlm_delta(
    x: Float[Array, "T in"],
    A: Float[Array, "P nR in"],
    B: Float[Array, "P R out"],
    plan: SmlmPlan,
    *,
    out_features: tuple[int, ...],
    implementation: str | None = None,
) -> Float[Array, "T out"]:
    """The delta of `smlm`, rounded to x's dtype, for `add_delta`.

    Args:
        x: Inputs, bfloat16, float16 or float32.
        A: Pages of the n stacked targets, x's dtype.
        B: Pages, columns of the targets side by side, x's dtype.
        plan: Work list of `build_plan`.
        out_features: Columns of each target, multiples of 16; they sum to B's last dimension.
        implementation: "xla", "triton", or None for triton on a GPU and xla elsewhere.

    Returns:
        The delta; rows without adapter are undefined, NaN perhaps.

    Raises:
        ValueError: shapes disagree or are no multiples of 16, or the implementation is unknown.
        TypeError: dtypes disagree.
        NotImplementedError: implementation="mosaic".
    """
    out_features = tuple(int(size) for size in out_features)
    _check_arrays(x, A, B, None, out_features)
    _check_plan(plan, x.shape[0])
    plan = SmlmPlan(*map(jnp.asarray, plan))
    if _choose(implementation) == "xla":
        return smlm_xla(x, A, B, plan, out_features, None)
    return smlm_delta_triton(x, A, B, plan, out_features)


def add_delta(y: Float[Array, "T out"], delta: Float[Array, "T out"], plan: SmlmPlan) -> Float[Array, "T out"]:
    """y plus the delta where the row has an adapter, y itself, bit for bit, where it has none.

    Plain elementwise XLA on purpose: it fuses into the consumer of y, and y's split sums into it.
    """
    total = (y.astype(jnp.float32) + delta.astype(jnp.float32)).astype(y.dtype)
    return jnp.where((jnp.asarray(plan.row_slot) >= 0)[:, None], total, y)


def delta_beside(implementation: str | None) -> bool:
    """Whether few rows should take this form: kernels can run beside each other, XLA's operations would only be more.

    Args:
        implementation: As for `smlm`.
    """
    return _choose(implementation) != "xla"
