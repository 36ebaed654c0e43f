"""Gated activations, act(gate) * up: definitions in plain jnp, and versions for use inside Triton kernels."""

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
"""Reference definitions, float32 -> float32."""


def check_activation(activation: str) -> None:
    """Checks that the activation is known.

    Raises:
        ValueError: it is not.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, expected one of {tuple(ACTIVATIONS)}")


def gated(activation: str, gate_up: Float[Array, "T FF"]) -> Float[Array, "T F"]:
    """act(gate) * up of the halves of `gate_up`, in its dtype; act(gate) is computed in float32 and rounded once."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    # f32 only inside the activation, like torch kernels, which round once; jnp would round after every operation.
    return ACTIVATIONS[activation](gate.astype(jnp.float32)).astype(gate.dtype) * up


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) inside a kernel, float32, with an absolute error below 5e-6.

    Computes 1 / (1 + e) as the square of rsqrt, a single instruction. The division and full-range exp of
    jax.nn.sigmoid take three times as many instructions, as long as the memory access itself.
    """
    root = lax.rsqrt(1.0 + jnp.exp2(x * -LOG2_E))
    return root * root


KERNEL_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": lambda x: x * sigmoid(x),
    "relu": ACTIVATIONS["relu"],
    "gelu_pytorch_tanh": ACTIVATIONS["gelu_pytorch_tanh"],
}
"""Activations supported inside kernels; gelu is missing because Pallas-Triton has no erf."""


def kernel_gated(activation: str, gate: Array, up: Array) -> Array:
    """`gated` inside a kernel."""
    return KERNEL_ACTIVATIONS[activation](gate.astype(jnp.float32)).astype(gate.dtype) * up


def value_and_slope(activation: str, x: Array) -> tuple[Array, Array]:
    """The activation of x and its derivative there, float32, inside a kernel."""
    if activation != "silu":
        return jax.jvp(KERNEL_ACTIVATIONS[activation], (x,), (jnp.ones_like(x),))
    s = sigmoid(x)
    return x * s, s + x * s * (1.0 - s)
