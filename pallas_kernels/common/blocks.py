"""Addressing of operands in Triton kernels: whole arrays, blocks of columns, masked loads."""

import functools
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array


def whole(a: Any) -> pl.BlockSpec:
    """A BlockSpec that gives the kernel the whole array."""
    rank = len(a.shape)
    return pl.BlockSpec(a.shape, lambda *_: (0,) * rank)


def block_of(index: Array, sizes: tuple[int, ...], width: int) -> tuple[Array, Array, Array]:
    """(target, first column, end of the target's columns) for a block of `width` columns within one target."""
    target, column, end = jnp.int32(0), index * width, jnp.int32(sizes[0])
    blocks, start = 0, 0
    for i, size in enumerate(sizes[:-1], start=1):
        blocks, start = blocks + pl.cdiv(size, width), start + size
        here = index >= blocks
        target = jnp.where(here, jnp.int32(i), target)
        column = jnp.where(here, start + (index - blocks) * width, column)
        end = jnp.where(here, jnp.int32(start + sizes[i]), end)
    return target, column, end


def column_block(index: Array, sizes: tuple[int, ...], width: int) -> tuple[Array, Array, Array]:
    """(target, columns [1, width], mask of those that belong to the target) for a block of columns."""
    target, column, end = block_of(index, sizes, width)
    columns = column + jnp.arange(width, dtype=jnp.int32)[None, :]
    return target, columns, columns < end


def masked_load(ref: Any, index: tuple[Array | int, ...], *masks: Array | None) -> Array:
    """Loads the elements at `index`; where a mask is false, returns zero without touching memory. None is no mask."""
    masks = [mask for mask in masks if mask is not None]
    if not masks:
        return plt.load(ref.at[index])
    shape = jnp.broadcast_shapes(*(jnp.shape(i) for i in index))
    mask = functools.reduce(lambda a, b: a & b, [jnp.broadcast_to(mask, shape) for mask in masks])
    return plt.load(ref.at[index], mask=mask, other=0.0)
