"""Device pages: an adapter split into chunks of 16 ranks, in the fused layout of the base's projections.

In a group of n targets, rows i*16 to i*16+16 of A belong to target i, whose columns of B are its slice of the
fused output. The scaling is folded into B: the delta is the sum over an adapter's pages and targets of
(x @ A_i.T) @ B_i. Ranks beyond a module's own, and modules without an adapter, are zero. Page 0 is all zeros and is
never written.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped
from numpy.typing import DTypeLike

from loquetier_jax.adapters.lora import LoraModule, LoraShape, LoraWeights, weight_key
from loquetier_jax.config import RANK_PAGE
from loquetier_jax.errors import IntegrityError
from loquetier_jax.models.spec import GROUPS, DecoderSpec


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraPages:
    """Pages (or their gradients) of one layer and one group of n targets, which share an input.

    Attributes:
        A: [P, n*16, in].
        B: [P, 16, out], where out is the sum of the targets' output widths.
    """

    A: Float[Array, "P ranks in"]
    B: Float[Array, "P 16 out"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdapterPages:
    """Pages of every layer and group: the stacks of an engine, its gradient pool, or the pages of one adapter.

    Attributes:
        layers: Per layer {group: LoraPages}, with the same P throughout: A [P, n*16, in], B [P, 16, out].
    """

    layers: list[dict[str, LoraPages]]

    @classmethod
    def empty(cls, spec: DecoderSpec, num_pages: int, dtype: DTypeLike) -> "AdapterPages":
        """`num_pages` pages of zeros on the device, including page 0; also makes the gradient pool (float32)."""
        return cls(
            [
                {
                    group: LoraPages(
                        jnp.zeros((num_pages, len(outs) * RANK_PAGE, features), dtype),
                        jnp.zeros((num_pages, RANK_PAGE, sum(outs)), dtype),
                    )
                    for group, (features, outs) in spec.group_shapes.items()
                }
                for _ in range(spec.num_hidden_layers)
            ]
        )

    @property
    def num_pages(self) -> int:
        """P."""
        return self.layers[0]["qkv_proj"].A.shape[0]

    def cut(self, start: int, stop: int) -> "AdapterPages":
        """The pages of layers [start, stop), by reference."""
        return AdapterPages(self.layers[start:stop])

    def spliced(self, start: int, new: "AdapterPages") -> "AdapterPages":
        """A copy with the layers from `start` on replaced by those of `new`, as many as it has."""
        return AdapterPages([*self.layers[:start], *new.layers, *self.layers[start + len(new.layers) :]])


def pages_of(weights: LoraWeights, shape: LoraShape, spec: DecoderSpec, dtype: DTypeLike) -> AdapterPages:
    """Casts an exact-rank adapter to pages; pure, works on jax arrays inside jit and on numpy arrays on the host.

    Args:
        weights: f32, {"layers.{i}.{target}": {"lora_A": [r, in], "lora_B": [out, r]}}.
        shape: Its shape; static under jit.
        spec: The base; static under jit.
        dtype: Compute dtype; B is scaled in f32 before the cast.

    Returns:
        Pages with a leading axis of `shape.num_pages`; numpy if `weights` is.
    """
    host = all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(weights))
    xp = np if host else jnp
    return AdapterPages(
        [
            {
                group: _group_pages(weights, shape, (layer, group), sizes, dtype, xp)
                for group, sizes in spec.group_shapes.items()
            }
            for layer in range(spec.num_hidden_layers)
        ]
    )


def gradients_of(page_gradients: AdapterPages, shape: LoraShape, spec: DecoderSpec) -> LoraWeights:
    """Converts gradients of an adapter's pages to exact-rank gradients; pure, for use inside jit.

    Applies the chain rule through `pages_of`: B's gradient is multiplied by the scaling that was folded in, the
    cast is treated as the identity, and gradients of padding ranks and untargeted modules are dropped.

    Args:
        page_gradients: AdapterPages with a leading axis of `shape.num_pages`, f32.
        shape: Static under jit.
        spec: Static under jit.

    Returns:
        f32, structured like `LoraWeights`.
    """
    gradients: LoraWeights = {}
    for layer, group, index, columns, module in _modules(shape, spec):
        pair = page_gradients.layers[layer][group]
        a = pair.A[:, index * RANK_PAGE : (index + 1) * RANK_PAGE].reshape(-1, pair.A.shape[-1])
        b = pair.B[:, :, columns].reshape(-1, columns.stop - columns.start)
        gradients[weight_key(layer, module.target)] = {
            "lora_A": a[: module.r].astype(np.float32),
            "lora_B": b[: module.r].T.astype(np.float32) * np.float32(module.scaling),
        }
    return gradients


def put_pages(pages: AdapterPages, page_ids: Int[Array, " k"], new: AdapterPages) -> AdapterPages:
    """`pages` with `new` (leading axis k) at `page_ids`; pure, for use inside a jit that donates `pages`.

    In place when donated. The caller must own the ids; none may be 0, and ids out of range are dropped.
    """
    return jax.tree.map(lambda old, one: old.at[page_ids].set(one), pages, new)


def take_pages(pages: AdapterPages, page_ids: Int[Array, " k"]) -> AdapterPages:
    """The pages at `page_ids`, leading axis k; pure, for use inside jit. `pages` is not changed."""
    return jax.tree.map(lambda leaf: leaf[page_ids], pages)


def write_pages(
    pages: AdapterPages, page_ids: Sequence[int], new: AdapterPages, write: Callable[..., AdapterPages] | None = None
) -> AdapterPages:
    """Writes an adapter's pages into the device stacks in place; `pages` is donated, use the result instead.

    One call, compiled per power of two: `padded` fills up the rest. Inside jit, use `put_pages`.

    Args:
        pages: Device stacks, donated.
        page_ids: Distinct, in 1 .. P-1.
        new: Leading axis len(page_ids) (preferably numpy then), or already padded (see `staging.stager`).
        write: `write_padded`, compiled for these shapes; None compiles it when it is first called.

    Raises:
        IntegrityError: invalid page ids; nothing is written.
    """
    ids, count = [int(i) for i in page_ids], new.num_pages
    total, full = pages.num_pages, padded_count(count)
    fits = 0 < len(ids) <= count and padded_count(len(ids)) == full
    if not fits or len(set(ids)) != len(ids) or not all(0 < i < total for i in ids):
        raise IntegrityError(f"page_ids: got {ids}, expected {count} distinct ids between 1 and {total - 1}")
    ids = np.asarray(ids + ids[-1:] * (full - len(ids)), np.int32)
    return (write or write_padded)(pages, ids, jax.tree.map(padded, new))


def write_counts(most: int) -> list[int]:
    """The numbers of pages that writes of up to `most` pages are compiled for."""
    return sorted({padded_count(n) for n in range(1, most + 1)})


def padded_count(count: int) -> int:
    """The number of pages that a write of `count` pages is compiled for: the next power of two."""
    return 1 << (count - 1).bit_length()


def padded(pages: Shaped[Any, "pages ..."]) -> Shaped[Any, "padded ..."]:
    """Pages with the last one repeated up to a power of two: writing it twice to one page changes nothing."""
    missing = padded_count(len(pages)) - len(pages)
    xp = np if isinstance(pages, np.ndarray) else jnp
    return xp.concatenate([pages, *[pages[-1:]] * missing]) if missing else pages


def read_pages(pages: AdapterPages, page_ids: Sequence[int]) -> AdapterPages:
    """Copies of the pages at `page_ids`, leading axis len(page_ids); one compile per number of pages."""
    return _take(pages, np.asarray(page_ids, np.int32))


@partial(jax.jit, donate_argnums=0)
def write_padded(pages: AdapterPages, page_ids: Int[Array, " k"], new: AdapterPages) -> AdapterPages:
    """Writes pages to the ids, in order, in place; see `write_pages`."""

    def put(stack: Array, pages: Array) -> Array:
        for k in range(len(pages)):  # slice by slice: compiles in a fraction of the time that a scatter takes
            if k:  # fused with the one before, it might no longer be written in place
                stack = jax.lax.optimization_barrier(stack)
            stack = jax.lax.dynamic_update_slice_in_dim(stack, pages[k : k + 1], page_ids[k], 0)
        return stack

    return jax.tree.map(put, pages, new)


_take = jax.jit(take_pages)


def _group_pages(
    weights: LoraWeights,
    shape: LoraShape,
    where: tuple[int, str],
    sizes: tuple[int, tuple[int, ...]],
    dtype: DTypeLike,
    xp: Any,
) -> LoraPages:
    layer, group = where
    features, outs = sizes
    ranks = shape.num_pages * RANK_PAGE
    a_parts, b_parts = [], []
    for target, out in zip(GROUPS[group], outs, strict=True):
        key = weight_key(layer, target)
        if key in shape.by_key:
            module = shape.by_key[key]
            fill = ((0, ranks - module.r), (0, 0))
            a = xp.pad(weights[key]["lora_A"], fill)
            b = xp.pad(weights[key]["lora_B"].T * np.float32(module.scaling), fill)
        else:
            a, b = xp.zeros((ranks, features), np.float32), xp.zeros((ranks, out), np.float32)
        a_parts.append(a.reshape(-1, RANK_PAGE, features))
        b_parts.append(b.reshape(-1, RANK_PAGE, out))
    return LoraPages(xp.concatenate(a_parts, axis=1).astype(dtype), xp.concatenate(b_parts, axis=2).astype(dtype))


def _modules(shape: LoraShape, spec: DecoderSpec) -> Iterator[tuple[int, str, int, slice, LoraModule]]:
    """(layer, group, index in the group, columns of the fused output, module) of every targeted module."""
    for layer in range(spec.num_hidden_layers):
        for group, (_, outs) in spec.group_shapes.items():
            starts = np.cumsum((0, *outs)).tolist()
            for index, target in enumerate(GROUPS[group]):
                module = shape.by_key.get(weight_key(layer, target))
                if module is not None:
                    yield layer, group, index, slice(starts[index], starts[index + 1]), module
