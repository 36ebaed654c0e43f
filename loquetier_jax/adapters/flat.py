"""An adapter's pages as one host buffer, [pages, elements of a page]: one transfer and one donated write load it.

The columns of a page are the leaves of `AdapterPages` in the order of `jax.tree.leaves`: layer by layer, the groups by
name, A before B. Every layer takes the same number of columns. Casting runs in few, large numpy calls, which release
the GIL: a thread that casts must not get in the loop's way.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Shaped
from numpy.lib.stride_tricks import as_strided
from numpy.typing import DTypeLike

from loquetier_jax.adapters.lora import LoraShape, LoraWeights
from loquetier_jax.adapters.pages import AdapterPages, LoraPages
from loquetier_jax.adapters.targets import weight_key
from loquetier_jax.config import RANK_PAGE
from loquetier_jax.models.spec import GROUPS, DecoderSpec

FlatPages = Shaped[np.ndarray, "pages N"]

_EXPONENTS = {"float32": (np.uint32, 0x7F800000), "bfloat16": (np.uint16, 0x7F80), "float16": (np.uint16, 0x7C00)}


class Piece(NamedTuple):
    """The arrays of one target in consecutive layers that have equal ranks and scalings.

    Attributes:
        layer: The first layer.
        target: The target.
        name: "lora_A" or "lora_B".
        arrays: [layers, r, in] or [layers, out, r]; any float dtype.
        scaling: Multiplies B, in f32.
    """

    layer: int
    target: str
    name: str
    arrays: Float[np.ndarray, "layers _ _"]
    scaling: float


class Place(NamedTuple):
    """Where a target is in the columns of one layer of a page.

    Attributes:
        a: First column of its rows of A, which are consecutive.
        b: First column of row 0 of its B.
        features: Width of A.
        out: Width of its B.
        row: Columns from one row of B to the next.
    """

    a: int
    b: int
    features: int
    out: int
    row: int


@dataclass(frozen=True)
class Layout:
    """The columns of a page of adapters on the base `spec`."""

    spec: DecoderSpec

    @cached_property
    def places(self) -> dict[str, Place]:
        """Target -> its place in layer 0."""
        found, start = {}, 0
        for group, (features, outs) in sorted(self.spec.group_shapes.items()):
            b = start + len(outs) * RANK_PAGE * features
            for index, (target, out) in enumerate(zip(GROUPS[group], outs, strict=True)):
                a, column = start + index * RANK_PAGE * features, b + sum(outs[:index])
                found[target] = Place(a, column, features, out, sum(outs))
            start = b + RANK_PAGE * sum(outs)
        return found

    @cached_property
    def layer(self) -> int:
        """Columns of one layer."""
        groups = self.spec.group_shapes.values()
        return sum(RANK_PAGE * (len(outs) * features + sum(outs)) for features, outs in groups)

    @property
    def size(self) -> int:
        """N: columns of a page."""
        return self.layer * self.spec.num_hidden_layers

    def cast(self, pieces: Iterable[Piece], num_pages: int, dtype: DTypeLike) -> FlatPages:
        """The page form of an adapter: bit for bit what `pages.pages_of` makes of the same numbers in f32.

        Args:
            pieces: All its arrays.
            num_pages: Its pages.
            dtype: Compute dtype; B is scaled in f32 before the cast.

        Returns:
            [num_pages, N], read-only.
        """
        flat = np.zeros((num_pages, self.size), dtype)
        with np.errstate(all="ignore"):  # NaN and infinity are kept; they affect only this adapter's rows
            for piece in pieces:
                self._put(flat, piece)
        flat.setflags(write=False)
        return flat

    def _put(self, flat: FlatPages, piece: Piece) -> None:
        place = self.places[piece.target]
        if piece.name == "lora_A":
            rows, start, step = _exact(piece.arrays, flat.dtype), place.a, place.features
        else:
            # Cast before it is transposed: half the bytes, in one type of numpy's own, which it copies much faster.
            scaled = np.multiply(piece.arrays, np.float32(piece.scaling), dtype=np.float32, casting="unsafe")
            rows, start, step = scaled.astype(flat.dtype).transpose(0, 2, 1), place.b, place.row
        if rows.dtype == flat.dtype:
            rows, flat = _bits(rows), _bits(flat)
        item = flat.itemsize
        for page, first in enumerate(range(0, rows.shape[1], RANK_PAGE)):
            part = rows[:, first : first + RANK_PAGE]
            columns = flat[page, piece.layer * self.layer + start :]
            as_strided(columns, part.shape, (self.layer * item, step * item, item))[...] = part


def _exact(arrays: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The arrays in a type from which a cast to `dtype` rounds once, as one from f32 does."""
    return arrays if arrays.dtype in (dtype, np.float32) else arrays.astype(np.float32)


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16) if array.itemsize == 2 else array


def pieces_of(weights: LoraWeights, shape: LoraShape) -> list[Piece]:
    """The pieces of an exact-rank adapter."""
    return [
        Piece(m.layer, m.target, name, np.asarray(array)[None], m.scaling)
        for m in shape.modules
        for name, array in weights[weight_key(m.layer, m.target)].items()
    ]


def flat_of(pages: AdapterPages) -> FlatPages:
    """The page form of pages that are numpy arrays already."""
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(pages)], axis=1)


def unflattened(flat: FlatPages, spec: DecoderSpec) -> AdapterPages:
    """The pages that a flat buffer holds, as views."""
    layers, start = [], 0
    for _ in range(spec.num_hidden_layers):
        layer = {}
        for group, (features, outs) in sorted(spec.group_shapes.items()):
            middle = start + len(outs) * RANK_PAGE * features
            end = middle + RANK_PAGE * sum(outs)
            a, b = flat[:, start:middle], flat[:, middle:end]
            layer[group] = LoraPages(a.reshape(len(flat), -1, features), b.reshape(len(flat), RANK_PAGE, -1))
            start = end
        layers.append(layer)
    return AdapterPages(layers)


def all_finite(flat: FlatPages) -> bool:
    """Whether no element is NaN or infinite."""
    kind, exponent = _EXPONENTS[flat.dtype.name]
    # By bits, in blocks that fit the cache: isfinite of bfloat16 is several times slower.
    bits = flat.reshape(-1).view(kind)
    block = 1 << 20
    return all(int((bits[i : i + block] & kind(exponent)).max()) != exponent for i in range(0, len(bits), block))
