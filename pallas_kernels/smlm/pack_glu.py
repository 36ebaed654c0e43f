"""The backward of act(gate) * up and the projection after it: the launch that reads x, fused with the activation.

It reads gate, up and the base's gradient of their product once, recomputes the product, and writes the gradients of
gate and up, and dA. Each program takes a block of columns and loops over rows, so that dA needs few partial sums.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.common.implementation import interpreted
from pallas_kernels.smlm.pack_kernels import through_glu
from pallas_kernels.smlm.pack_sides import Cut, Side
from pallas_kernels.smlm.pack_triton import Work, check_elements, launch, rows_of
from pallas_kernels.smlm.pack_tuning import GluConfig, default_glu_config
from pallas_kernels.smlm.plan import RANK_PAGE

F32 = jnp.float32


# Jitted so that the layers of a model trace and lower the kernels once per shape.
@functools.partial(jax.jit, static_argnames=("activation", "config", "interpret"))
def pack_glu_triton(
    gate_up: Float[Array, "G L FF"],
    A: Float[Array, "G MP R F"],
    dS: Float[Array, "G L MP R"],
    dact: Float[Array, "G L F"],
    activation: str,
    *,
    config: GluConfig | None = None,
    interpret: bool | None = None,
) -> tuple[Float[Array, "G L FF"], Float[Array, "G MP R F"]]:
    """Gradients of base(act) + S B with respect to gate_up and A, where act = activation(gate) * up and S = act A^T.

    Args:
        gate_up: [gate | up].
        A: Pages of the projection's adapter, float32 to get an unrounded gradient; absent pages are zero.
        dS: From `pack_dy_triton`, in gate_up's dtype.
        dact: Gradient of act through the base projection, gate_up's dtype.
        activation: A key of `common.activation.KERNEL_ACTIVATIONS`.
        config: Block sizes; by default chosen from the shapes.
        interpret: Run as plain XLA operations; by default only on CPU.

    Returns:
        Gradients of gate_up and A in their dtypes, accumulated in float32.

    Raises:
        ValueError: an operand has 2^31 elements or more.
    """
    packs, rows, size = dact.shape
    dtype, side = gate_up.dtype, Side(packs, rows, (size,), A.shape[1] * RANK_PAGE)
    check_elements(gate_up=gate_up)
    interpret = interpreted(interpret)
    config = config or default_glu_config(rows, side.ranks, dtype)
    flat = rows_of(dtype, gate_up=gate_up, A=A, dS=dS.reshape(packs, rows, -1), dact=dact)
    cut = Cut(side, config.block, side.chunks)
    outs = {
        "dA": jax.ShapeDtypeStruct((config.parts, *flat["A"].shape), F32),
        "d": jax.ShapeDtypeStruct(flat["gate_up"].shape, dtype),
    }
    body, operands = functools.partial(through_glu, activation, config.parts), ("gate_up", "dact", "dS", "A", "dA", "d")
    params = plt.CompilerParams(num_warps=config.warps, num_stages=config.stages)
    work = Work(body, cut, cut.strips * config.parts, operands)
    found = launch("pack_backward_glu", [work], flat, outs, params, interpret)
    dA = functools.reduce(jnp.add, found["dA"])
    return found["d"].reshape(gate_up.shape), dA.reshape(A.shape).astype(A.dtype)
