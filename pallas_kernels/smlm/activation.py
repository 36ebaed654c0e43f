"""Gated activations inside a Triton kernel: act(gate) * up.

The formula as Triton compiles it issues about 40 instructions an element (full-range exp and division, one rounding at
a time), which costs as much as the memory traffic around it. For bfloat16 silu is therefore written in PTX, two
elements at a time: ex2 and rcp of the special function unit are good to 2^-22, far below bfloat16's 2^-9.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt
from jaxtyping import Array

Activation = Callable[[Array], Array]

ACTIVATIONS: dict[str, Activation] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}
"""What a kernel may compute, float32 -> float32; gelu is not among them, as no Triton kernel of Pallas has an erf."""

_MINUS_LOG2_E = "0fBFB8AA3B"
_SIGMOID = f"""
    shl.b32 g0, $GATE, 16;
    and.b32 g1, $GATE, 0xffff0000;
    mul.f32 s0, g0, {_MINUS_LOG2_E};
    mul.f32 s1, g1, {_MINUS_LOG2_E};
    ex2.approx.ftz.f32 s0, s0;
    ex2.approx.ftz.f32 s1, s1;
    add.f32 s0, s0, 0f3F800000;
    add.f32 s1, s1, 0f3F800000;
    rcp.approx.ftz.f32 s0, s0;
    rcp.approx.ftz.f32 s1, s1;"""
# The product with minus zero added is the rounded product: sm_80 has no multiplication of bf16x2 alone.
_SILU = f"""{{
    .reg .f32 g0, g1, s0, s1;
    .reg .b32 a, zero;{_SIGMOID.replace("$GATE", "$1")}
    mul.f32 g0, g0, s0;
    mul.f32 g1, g1, s1;
    cvt.rn.bf16x2.f32 a, g1, g0;
    mov.b32 zero, 0x80008000;
    fma.rn.bf16x2 $0, a, $2, zero;
}}"""


def gated(activation: str, gate: Array, up: Array, interpret: bool) -> Array:
    """act(gate) * up, with act(gate) rounded to their dtype, in their dtype.

    Args:
        activation: A key of ACTIVATIONS.
        gate, up: [rows, columns].
        interpret: Whether there is a GPU below.
    """
    if activation == "silu" and gate.dtype == jnp.bfloat16 and not interpret:
        (out,) = plt.elementwise_inline_asm(
            _SILU,
            args=[gate, up],
            constraints="=r,r,r",
            pack=2,
            result_shape_dtypes=[jax.ShapeDtypeStruct(gate.shape, gate.dtype)],
        )
        return out
    act = ACTIVATIONS[activation](gate.astype(jnp.float32)).astype(gate.dtype)
    return (act.astype(jnp.float32) * up.astype(jnp.float32)).astype(up.dtype)
