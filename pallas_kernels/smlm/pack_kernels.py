"""Bodies of the Triton kernels for packs and runs; one program handles a part of one pack or run.

`place` gives the location of its rows and pages. Every dimension is indexed with arrays, because masked loads that mix
arrays and slices do not run in interpret mode.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array

from pallas_kernels.common.activation import value_and_slope
from pallas_kernels.common.products import F32, product
from pallas_kernels.smlm.pack_sides import Cut, Pack


def _columns(start: Array, count: int, end: Array, whole: bool) -> tuple[Array, Array | None]:
    columns = start + jnp.arange(count, dtype=jnp.int32)
    return columns, None if whole else columns < end


def _mask(rows: Array | None, columns: Array | None) -> Array | None:
    """The outer product of two masks, where None means all true."""
    if rows is None:
        return None if columns is None else columns[None, :]
    return rows[:, None] if columns is None else rows[:, None] & columns[None, :]


def _load(ref: Any, rows: Array, columns: Array, mask: Array | None) -> Array:
    at = ref.at[rows[:, None], columns[None, :]]
    return plt.load(at) if mask is None else plt.load(at, mask=mask, other=0.0)


def dS_share(cut: Cut, place: Pack, index: Array, y_ref: Any, w_ref: Any, h_ref: Any) -> None:
    """h[part, tile, ranks] = y w^T over a span of columns: a partial sum of dS, with y = dY and w = B."""
    block = cut.block
    _, part, start, end, rows, ok = cut.tile(place, index)

    def step(number: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        columns, inside = _columns(start + number * block.columns, block.columns, end, cut.whole)
        y = _load(y_ref, rows, columns, _mask(ok, inside))
        new = []
        for (at, size), total in zip(cut.ranks, sums, strict=True):
            w = _load(w_ref, place.pages(at, size), columns, _mask(place.used(at, size), inside))
            new.append(total + product(y, w, 1))
        return tuple(new)

    sums = tuple(jnp.zeros((block.rows, size), F32) for _, size in cut.ranks)
    sums = lax.fori_loop(0, pl.cdiv(block.span, block.columns), step, sums)
    for (at, size), total in zip(cut.ranks, sums, strict=True):
        ranks = at + jnp.arange(size, dtype=jnp.int32)
        plt.store(h_ref.at[part, rows[:, None], ranks[None, :]], total, mask=_mask(ok, None))


def gradient(cut: Cut, place: Pack, index: Array, y_ref: Any, s_ref: Any, g_ref: Any) -> None:
    """g[ranks, columns] = s^T y over all rows: dA (s = dS, y = x) or dB (s = S, y = dY).

    Computed as y^T s: tensor cores want the tall operand first.
    """
    side, block = cut.side, cut.block
    target, start, end = side.block(index, block.columns)
    columns, inside = _columns(start, block.columns, end, cut.whole)

    def step(number: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        rows, ok = place.rows(number * block.rows, block.rows)
        y = _load(y_ref, rows, columns, _mask(ok, inside))
        new = []
        for (at, size), total in zip(cut.ranks, sums, strict=True):
            s = _load(s_ref, rows, side.in_s(at, size, target), _mask(ok, None))
            new.append(total + product(y, s, 0, contract_a=0))
        return tuple(new)

    sums = tuple(jnp.zeros((block.columns, size), F32) for _, size in cut.ranks)
    sums = lax.fori_loop(0, place.steps(block.rows), step, sums)
    for (at, size), total in zip(cut.ranks, sums, strict=True):
        ranks = place.sums(at, size)
        to = g_ref.at[ranks[None, :], columns[:, None]]
        plt.store(to, total, mask=_mask(inside, place.used(at, size)))


def dX_tile(cut: Cut, place: Pack, index: Array, s_ref: Any, w_ref: Any, *refs: Any) -> None:
    """o[tile, columns] = s w over a span of columns, plus y if refs are (y, o): dX, with s = dS and w = A."""
    side, block = cut.side, cut.block
    target, _, start, end, rows, ok = cut.tile(place, index)
    s = [_load(s_ref, rows, side.in_s(at, size, target), _mask(ok, place.used(at, size))) for at, size in cut.ranks]
    *y_ref, o_ref = refs

    def step(number: Array, carry: None) -> None:
        columns, inside = _columns(start + number * block.columns, block.columns, end, cut.whole)
        mask, total = _mask(ok, inside), jnp.zeros((block.rows, block.columns), F32)
        for ref in y_ref:
            total += _load(ref, rows, columns, mask).astype(F32)
        for (at, size), one in zip(cut.ranks, s, strict=True):
            total += product(one, _load(w_ref, place.pages(at, size), columns, _mask(place.used(at, size), inside)), 0)
        plt.store(o_ref.at[rows[:, None], columns[None, :]], total.astype(o_ref.dtype), mask=mask)

    lax.fori_loop(0, pl.cdiv(block.span, block.columns), step, None)


def through_glu(
    activation: str,
    parts: int,
    cut: Cut,
    place: Pack,
    index: Array,
    gate_up_ref: Any,
    dact_ref: Any,
    s_ref: Any,
    w_ref: Any,
    g_ref: Any,
    o_ref: Any,
) -> None:
    """Backward of act = activation(gate) * up: d = dact + s w; o = [dgate | dup]; g[part, ranks, columns] = s^T act.

    `parts` programs share the rows of a block of columns.
    As in the forward, the activation is computed in float32 and rounded before the product with up; d is not rounded.
    """
    side, block, dtype = cut.side, cut.block, o_ref.dtype
    part, index = (f(index, jnp.int32(cut.strips)) for f in (lax.div, lax.rem))
    tiles = pl.cdiv(side.rows, block.rows)
    steps = pl.cdiv(tiles, parts)
    _, start, end = side.block(index, block.columns)
    columns, inside = _columns(start, block.columns, end, cut.whole)
    ups = columns + side.sizes[0]
    w = [_load(w_ref, place.pages(at, size), columns, _mask(place.used(at, size), inside)) for at, size in cut.ranks]

    def step(number: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        rows, ok = place.rows(number * block.rows, block.rows)
        mask = _mask(ok, inside)
        gate, up = (_load(gate_up_ref, rows, at, mask).astype(F32) for at in (columns, ups))
        s = [_load(s_ref, rows, side.in_s(at, size, jnp.int32(0)), _mask(ok, None)) for at, size in cut.ranks]
        d = _load(dact_ref, rows, columns, mask).astype(F32)
        for one, other in zip(s, w, strict=True):
            d += product(one, other, 0)
        value, slope = value_and_slope(activation, gate)
        value = value.astype(dtype).astype(F32)
        plt.store(o_ref.at[rows[:, None], columns[None, :]], (d * up * slope).astype(dtype), mask=mask)
        plt.store(o_ref.at[rows[:, None], ups[None, :]], (d * value).astype(dtype), mask=mask)
        act = (value * up).astype(dtype)
        # s first, so that act is not transposed in registers, which would add 30 us to 85.
        return tuple(total + product(one, act, 0, contract_a=0) for total, one in zip(sums, s, strict=True))

    sums = tuple(jnp.zeros((size, block.columns), F32) for _, size in cut.ranks)
    last = tiles if parts == 1 else jnp.minimum((part + 1) * steps, tiles)
    sums = lax.fori_loop(0 if parts == 1 else part * steps, last, step, sums)
    for (at, size), total in zip(cut.ranks, sums, strict=True):
        ranks = place.sums(at, size)
        mask = None if inside is None else inside[None, :]
        plt.store(g_ref.at[part, ranks[:, None], columns[None, :]], total, mask=mask)
