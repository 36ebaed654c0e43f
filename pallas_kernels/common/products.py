"""Products and sums inside a Triton kernel: float32, in one order."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

F32 = jnp.float32


def add(a: Array, b: Array) -> Array:
    """a + b, and not as the accumulator of the product that b may be: tensor cores would round that sum otherwise.

    Written so that Triton sees no addition; LLVM makes it one.
    """
    return a - b * -1.0


def tree_sum(parts: list[Array]) -> Array:
    """Adds neighbours, then neighbours of sums: an aligned part of the list may be summed elsewhere first."""
    while len(parts) > 1:
        parts = [add(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def product(a: Array, b: Array, contract_b: int, contract_a: int = 1) -> Array:
    """The matrix product over a's dimension `contract_a` and b's dimension `contract_b`, float32."""
    precision = lax.Precision.HIGHEST if a.dtype == F32 else None  # else Triton takes TF32
    return lax.dot_general(a, b, (((contract_a,), (contract_b,)), ((), ())), precision, preferred_element_type=F32)
