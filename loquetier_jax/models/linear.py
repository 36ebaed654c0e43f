"""Frozen weight matrices as objects, so that layers do not depend on how a matrix is stored."""

from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float
from numpy.typing import DTypeLike


@runtime_checkable
class Linear(Protocol):
    """y = h W + b for rows h [T, in] and a frozen matrix W [in, out] in any storage format."""

    def dot(self, h: Float[Array, "T in"], dtype: DTypeLike | None = None) -> Float[Array, "T out"]:
        """h W plus the bias, if any; accumulated and returned in `dtype`, or h's dtype if None."""

    def dot_transpose(self, dy: Float[Array, "T out"], dtype: DTypeLike | None = None) -> Float[Array, "T in"]:
        """dy W^T, i.e. d loss / d h from d loss / d y. W has no gradient."""


# The bias comes first, to keep a layer's leaves in checkpoint order (o_bias before o_proj).
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
    """A matrix stored as its transpose: an embedding table used as the output head.

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
    """Contracts x's columns with axis `axis` of w."""
    return jax.lax.dot_general(x, w, (((1,), (axis,)), ((), ())), preferred_element_type=dtype)
