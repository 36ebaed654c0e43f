"""Gated activations, act(gate) * up: their definition in plain jnp, and their forms inside a Triton kernel."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

LOG2_E = 1.4426950408889634

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}
"""The definitions, float32 -> float32."""


def check_activation(activation: str) -> None:
    """There is such an activation.

    Raises:
        ValueError: there is none.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, expected one of {tuple(ACTIVATIONS)}")


def gated(activation: str, gate_up: Float[Array, "T FF"]) -> Float[Array, "T F"]:
    """act(gate) * up, the two side by side in `gate_up`; in its dtype, act(gate) computed in float32 and rounded."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    # f32 inside the activation only: a torch kernel rounds once, jnp would after every step of the formula.
    return ACTIVATIONS[activation](gate.astype(jnp.float32)).astype(gate.dtype) * up


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) inside a kernel, float32, within 5e-6 of its value.

    1 / (1 + e) as the square of rsqrt, which is one instruction: the division and the full-range exp of jax.nn.sigmoid
    take three times as many instructions an element, which is as long as the memory needs for it.
    """
    root = lax.rsqrt(1.0 + jnp.exp2(x * -LOG2_E))
    return root * root


KERNEL_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": lambda x: x * sigmoid(x),
    "relu": ACTIVATIONS["relu"],
    "gelu_pytorch_tanh": ACTIVATIONS["gelu_pytorch_tanh"],
}
"""What a kernel may compute; gelu is not among them, as no Triton kernel of Pallas has an erf."""


def kernel_gated(activation: str, gate: Array, up: Array) -> Array:
    """`gated` inside a kernel."""
    return KERNEL_ACTIVATIONS[activation](gate.astype(jnp.float32)).astype(gate.dtype) * up


def value_and_slope(activation: str, x: Array) -> tuple[Array, Array]:
    """The activation of x and its derivative there, float32, inside a kernel."""
    if activation != "silu":
        return jax.jvp(KERNEL_ACTIVATIONS[activation], (x,), (jnp.ones_like(x),))
    s = sigmoid(x)
    return x * s, s + x * s * (1.0 - s)
