"""Argument checks of the ops on adapter pages."""

from dataclasses import fields
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.common.checks import check_dtype, check_rank, check_shapes
from pallas_kernels.smlm.plan import RANK_PAGE, SmlmPlan, plan_shapes


def check_pages(size: int, dtype: Any, A: Any, B: Any, out_features: tuple[int, ...]) -> None:
    """Checks that A and B are pages of targets with these columns, for inputs of `size` features.

    Raises:
        ValueError: shapes disagree or are not multiples of 16.
        TypeError: their dtype is not `dtype`, or is not floating point.
    """
    check_rank("A", A, 3)
    check_rank("B", B, 3)
    if not out_features or any(n < 16 or n % 16 for n in out_features):
        raise ValueError(f"out_features: got {out_features}, expected positive multiples of 16")
    if size == 0 or size % 16:
        raise ValueError(f"x: got {size} input features, expected a positive multiple of 16")
    pages = B.shape[0]
    check_shapes(
        A=(A, (pages, len(out_features) * RANK_PAGE, size)), B=(B, (pages, RANK_PAGE, sum(out_features)))
    )
    check_dtype("A", A, "x", dtype)
    check_dtype("B", B, "x", dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"x: got dtype {dtype}, expected a floating-point dtype")


def check_arrays(x: Any, A: Any, B: Any, y: Any, out_features: tuple[int, ...]) -> None:
    """Checks that every array of a forward has the shape implied by x and out_features, and x's dtype.

    Raises:
        ValueError, TypeError: as `check_pages`.
    """
    check_rank("x", x, 2)
    check_pages(x.shape[1], x.dtype, A, B, out_features)
    if y is not None:
        check_shapes(y=(y, (x.shape[0], sum(out_features))))
        check_dtype("y", y, "x", x.dtype)


def check_plan(plan: SmlmPlan, rows: int) -> None:
    """Checks that the plan is for `rows` rows and that its shapes are consistent.

    Raises:
        ValueError: they are not; the message gives both values.
        TypeError: an array is not int32.
    """
    if plan.row_slot.shape != (rows,):
        raise ValueError(f"plan: got a plan of {plan.row_slot.shape[0]} rows, expected x's {rows}")
    check_rank("plan.tile_pages", plan.tile_pages, 2)
    check_rank("plan.pack_pages", plan.pack_pages, 2)
    if plan.pack_rows < 0 or plan.train_rows > rows:
        packs = f"{plan.pack_pages.shape[0]} packs of {plan.pack_rows} rows"
        raise ValueError(f"plan.pack_rows: got {packs}, expected 0 to x's {rows} rows in all")
    tiles, pages = plan.tile_pages.shape
    shapes = plan_shapes(rows, tiles, pages, plan.wide_len.shape[0])
    for name in (f.name for f in fields(SmlmPlan) if not f.metadata.get("static")):
        array, shape = getattr(plan, name), getattr(shapes, name).shape
        if name != "pack_pages":
            check_shapes(**{f"plan.{name}": (array, shape)})
        if array.dtype != np.int32:
            raise TypeError(f"plan.{name}: got dtype {array.dtype}, expected int32")


def check_backward(S: Any, x: Any, A: Any, B: Any, plan: SmlmPlan, dy: Any, out_features: tuple[int, ...]) -> None:
    """Checks that every array of a backward has the shape implied by the plan's packs and out_features.

    Raises:
        ValueError: shapes disagree, or the plan has no packs.
        TypeError: dtypes disagree.
    """
    check_rank("x", x, 2)
    check_rank("S", S, 4)
    check_rank("plan.pack_pages", plan.pack_pages, 2)
    check_pages(x.shape[1], x.dtype, A, B, out_features)
    rows, pages = plan.train_rows, plan.pack_pages.shape[1]
    if not rows:
        raise ValueError("plan: got no train rows, expected at least one pack (see `SmlmPlan.pack_pages`)")
    if S.shape[2] < pages:
        raise ValueError(f"S: got {S.shape[2]} pages per row, expected at least plan.pack_pages' {pages}")
    check_shapes(
        x=(x, (rows, x.shape[1])),
        S=(S, (rows, len(out_features), S.shape[2], RANK_PAGE)),
        dy=(dy, (rows, sum(out_features))),
    )
    check_dtype("S", S, "x", x.dtype)
    check_dtype("dy", dy, "x", x.dtype)
