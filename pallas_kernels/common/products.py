"""Float32 products and sums with a fixed order, for use inside Triton kernels."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

F32 = jnp.float32


def add(a: Array, b: Array) -> Array:
    """a + b, without Triton fusing it into a product's accumulator, where tensor cores would round differently.

    Written so that Triton sees no addition; LLVM turns it into one.
    """
    return a - b * -1.0


def tree_sum(parts: list[Array]) -> Array:
    """Sums as a balanced binary tree, so that aligned sublists may be summed separately first."""
    while len(parts) > 1:
        parts = [add(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def product(a: Array, b: Array, contract_b: int, contract_a: int = 1) -> Array:
    """The matrix product over a's dimension `contract_a` and b's dimension `contract_b`, float32."""
    precision = lax.Precision.HIGHEST if a.dtype == F32 else None  # otherwise Triton uses TF32
    return lax.dot_general(a, b, (((contract_a,), (contract_b,)), ((), ())), precision, preferred_element_type=F32)
