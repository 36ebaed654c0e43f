"""Frozen weight matrices as objects: a layer asks for a product, and knows no storage."""

from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float
from numpy.typing import DTypeLike


@runtime_checkable
class Linear(Protocol):
    """y = h W + b of rows h [T, in] and a frozen matrix W [in, out], however it is stored."""

    def dot(self, h: Float[Array, "T in"], dtype: DTypeLike | None = None) -> Float[Array, "T out"]:
        """h W, plus the bias where there is one; in `dtype` (also of the accumulation), None for that of h."""

    def dot_transpose(self, dy: Float[Array, "T out"], dtype: DTypeLike | None = None) -> Float[Array, "T in"]:
        """dy W^T: d loss / d h from d loss / d y. W has no gradient."""


# The bias first: the leaves of a layer lie in the order of their names in a checkpoint, o_bias before o_proj.
@partial(jax.tree_util.register_dataclass, data_fields=["bias", "w"], meta_fields=[])
@dataclass(frozen=True)
class Dense:
    """A matrix in the compute dtype.

    Attributes:
        w: [in, out].
        bias: [out], or None.
    """

    w: Float[Array, "in out"]
    bias: Float[Array, " out"] | None = None

    def dot(self, h: Float[Array, "T in"], dtype: DTypeLike | None = None) -> Float[Array, "T out"]:
        """See Linear."""
        y = _product(h, self.w, 0, dtype)
        return y if self.bias is None else y + self.bias[None]

    def dot_transpose(self, dy: Float[Array, "T out"], dtype: DTypeLike | None = None) -> Float[Array, "T in"]:
        """See Linear."""
        return _product(dy, self.w, 1, dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Transposed:
    """A matrix that is stored as its transpose: an embedding table as the output head.

    Attributes:
        w: [out, in].
    """

    w: Float[Array, "out in"]

    def dot(self, h: Float[Array, "T in"], dtype: DTypeLike | None = None) -> Float[Array, "T out"]:
        """See Linear."""
        return _product(h, self.w, 1, dtype)

    def dot_transpose(self, dy: Float[Array, "T out"], dtype: DTypeLike | None = None) -> Float[Array, "T in"]:
        """See Linear."""
        return _product(dy, self.w, 0, dtype)


def _product(x: Array, w: Array, axis: int, dtype: DTypeLike | None) -> Array:
    """x's columns against one axis of w."""
    return jax.lax.dot_general(x, w, (((1,), (axis,)), ((), ())), preferred_element_type=dtype)
