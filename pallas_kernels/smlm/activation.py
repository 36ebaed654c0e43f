"""Gated activations inside a Triton kernel: act(gate) * up."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

LOG2_E = 1.4426950408889634


def silu(x: Array) -> Array:
    """x / (1 + exp(-x)), float32.

    1 / (1 + e) as the square of rsqrt, which is one instruction: the division and the full-range exp of jax.nn.silu
    take three times as many instructions an element, which is as long as the memory needs for it.
    """
    root = lax.rsqrt(1.0 + jnp.exp2(x * -LOG2_E))
    return x * (root * root)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": silu,
    "relu": jax.nn.relu,
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}
"""What a kernel may compute, float32 -> float32; gelu is not among them, as no Triton kernel of Pallas has an erf."""


def gated(activation: str, gate: Array, up: Array) -> Array:
    """act(gate) * up in their dtype, act(gate) computed in float32 and rounded before the product."""
    return ACTIVATIONS[activation](gate.astype(jnp.float32)).astype(gate.dtype) * up
