"""The forward for few rows: the delta is computed concurrently with the base GEMM and added by the consumer of both.

Adding into y would wait for y. At decode the base GEMM streams its weights and leaves room on every SM; the delta only
needs x, so a device that runs independent kernels concurrently hides the delta's launches behind the GEMM.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.smlm.plan import SmlmPlan
from pallas_kernels.smlm.tuning import FEW_ROWS


def delta_beside(rows: int, plan: SmlmPlan, implementation: str) -> bool:
    """Whether a forward takes this form: few rows, no train rows, and a kernel implementation.

    Kernels can run concurrently; as XLA operations, this form would only add work.

    Args:
        rows: T.
        plan: Work list.
        implementation: One of `common.implementation.IMPLEMENTATIONS`.
    """
    return implementation != "xla" and 0 < rows <= FEW_ROWS and not plan.train_rows


def add_delta(y: Float[Array, "T out"], delta: Float[Array, "T out"], plan: SmlmPlan) -> Float[Array, "T out"]:
    """y plus the delta in rows with an adapter; y itself, bit for bit, in rows without.

    Deliberately plain elementwise XLA: it fuses into the consumer of y, and with y's split-k sum.
    """
    total = (y.astype(jnp.float32) + delta.astype(jnp.float32)).astype(y.dtype)
    return jnp.where((jnp.asarray(plan.row_slot) >= 0)[:, None], total, y)
