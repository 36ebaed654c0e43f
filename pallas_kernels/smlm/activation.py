"""Gated activations inside a Triton kernel: act(gate) * up."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

LOG2_E = 1.4426950408889634


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), float32, within 5e-6 of its value.

    1 / (1 + e) as the square of rsqrt, which is one instruction: the division and the full-range exp of jax.nn.sigmoid
    take three times as many instructions an element, which is as long as the memory needs for it.
    """
    root = lax.rsqrt(1.0 + jnp.exp2(x * -LOG2_E))
    return root * root


def silu(x: Array) -> Array:
    """x * sigmoid(x)."""
    return x * sigmoid(x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": silu,
    "relu": jax.nn.relu,
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}
"""What a kernel may compute, float32 -> float32; gelu is not among them, as no Triton kernel of Pallas has an erf."""


def check_activation(activation: str) -> None:
    """Some kernel has it.

    Raises:
        ValueError: none has.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, expected one of {tuple(ACTIVATIONS)}")


def value_and_slope(activation: str, x: Array) -> tuple[Array, Array]:
    """The activation of x and its derivative there, float32."""
    if activation != "silu":
        return jax.jvp(ACTIVATIONS[activation], (x,), (jnp.ones_like(x),))
    s = sigmoid(x)
    return x * s, s + x * s * (1.0 - s)


def gated(activation: str, gate: Array, up: Array) -> Array:
    """act(gate) * up in their dtype, act(gate) computed in float32 and rounded before the product."""
    return ACTIVATIONS[activation](gate.astype(jnp.float32)).astype(gate.dtype) * up
