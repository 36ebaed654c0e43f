"""The forward for few rows: the delta is computed beside the base GEMM, and added by whatever reads both.

Adding into y waits for it. At decode a base GEMM streams its weights and leaves room on every SM: the delta needs only
x, so a device that runs independent kernels at one time hides its launches behind the GEMM.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.smlm.plan import SmlmPlan
from pallas_kernels.smlm.tuning import FEW_ROWS


def delta_beside(rows: int, plan: SmlmPlan, implementation: str) -> bool:
    """Whether a forward of y takes this form: few rows, none that train, and kernels.

    Kernels can run beside each other, XLA's operations would only be more.

    Args:
        rows: T.
        plan: Work list.
        implementation: One of `common.implementation.IMPLEMENTATIONS`.
    """
    return implementation != "xla" and 0 < rows <= FEW_ROWS and not plan.train_rows


def add_delta(y: Float[Array, "T out"], delta: Float[Array, "T out"], plan: SmlmPlan) -> Float[Array, "T out"]:
    """y plus the delta where the row has an adapter, y itself, bit for bit, where it has none.

    Plain elementwise XLA on purpose: it fuses into the consumer of y, and y's split sums into it.
    """
    total = (y.astype(jnp.float32) + delta.astype(jnp.float32)).astype(y.dtype)
    return jnp.where((jnp.asarray(plan.row_slot) >= 0)[:, None], total, y)
