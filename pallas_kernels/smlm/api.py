"""The public op: validation, choice of implementation, gradients."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.smlm.checks import IMPLEMENTATIONS, check_count, check_rank, choose
from pallas_kernels.smlm.plan import RANK_PAGE, SmlmPlan, plan_shapes
from pallas_kernels.smlm.ref import smlm_ref
from pallas_kernels.smlm.triton import smlm_triton
from pallas_kernels.smlm.xla import smlm_xla


def smlm(
    x: Float[Array, "T in"],
    A: Float[Array, "P nR in"],
    B: Float[Array, "P R out"],
    plan: SmlmPlan,
    *,
    out_features: tuple[int, ...],
    y: Float[Array, "T out"] | None = None,
    implementation: str | None = None,
    S_rows: int = 0,
) -> Float[Array, "T out"] | tuple[Float[Array, "T out"], Float[Array, "K n MP R"]]:
    """Segmented multi-LoRA multiplication: the delta of every row under its own adapter, added to y.

    delta[t, cols_i] = sum over the row's pages p of (x[t] @ A[p, i*R:(i+1)*R].T) @ B[p, :, cols_i], R = 16,
    with scaling folded into B. Products take operands in the arrays' dtype (S = x A^T is rounded to it) and
    sum in float32, in an order that depends on the input size alone; nothing crosses from tile to tile.

    Differentiable in x, A, B and y, through the reference `smlm_ref`: for research; training has `pack_backward_dy` and
    `pack_backward_x`.

    Args:
        x: Inputs, bfloat16, float16 or float32.
        A: Pages of the n stacked targets, x's dtype. Page 0 means none and is never read by the kernels.
        B: Pages, columns of the targets side by side, x's dtype.
        plan: Work list of `build_plan`; on the device, its page numbers are trusted to be below P.
        out_features: Columns of each target, multiples of 16; they sum to B's last dimension.
        y: What the delta is added to, x's dtype. Under jit the kernels write it in place where XLA may reuse
            it (donate it, or let it be a temporary). None: the delta alone, zero for rows without adapter.
        implementation: "xla", "triton", or None for triton on a GPU and xla elsewhere.
        S_rows: K; if any, S of the first K rows is returned too, which `pack_backward_dy` takes. The call is then not
            differentiable.

    Returns:
        y plus the delta; rows without adapter are y's, bit for bit. S = x A^T in x's dtype, by target and page, is
        0 where a row has no such page.

    Raises:
        ValueError: shapes disagree or are no multiples of 16, the implementation is unknown, or S_rows is no number
            of rows that x has.
        TypeError: dtypes disagree.
        NotImplementedError: implementation="mosaic".
    """
    out_features = tuple(int(size) for size in out_features)
    _check_arrays(x, A, B, y, out_features)
    _check_plan(plan, x.shape[0])
    check_count("S_rows", S_rows, x.shape[0])
    implementation = _choose(implementation)
    if S_rows:
        function = smlm_triton if implementation == "triton" else smlm_xla
        return function(x, A, B, SmlmPlan(*map(jnp.asarray, plan)), out_features, y, S_rows=S_rows)
    return _smlm(x, A, B, y, plan, out_features, implementation)


def _choose(implementation: str | None) -> str:
    if implementation == "mosaic":
        raise NotImplementedError(f"implementation: got 'mosaic', expected one of {IMPLEMENTATIONS} or None")
    return choose(implementation)


def _check_arrays(x: Any, A: Any, B: Any, y: Any, out_features: tuple[int, ...]) -> None:
    """Every array has the shape that x and out_features imply, and x's dtype."""
    for name, array, rank in (("x", x, 2), ("A", A, 3), ("B", B, 3)):
        check_rank(name, array, rank)
    if not out_features or any(size < 16 or size % 16 for size in out_features):
        raise ValueError(f"out_features: got {out_features}, expected positive multiples of 16")
    if x.shape[1] == 0 or x.shape[1] % 16:
        raise ValueError(f"x: got {x.shape[1]} input features, expected a positive multiple of 16")
    out = sum(out_features)
    expected = {
        "A": (A, (B.shape[0], len(out_features) * RANK_PAGE, x.shape[1])),
        "B": (B, (B.shape[0], RANK_PAGE, out)),
    }
    if y is not None:
        expected["y"] = (y, (x.shape[0], out))
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise ValueError(
                f"{name}: got shape {array.shape}, expected {shape} "
                f"(x is {x.shape}, B {B.shape}, out_features {out_features})"
            )
        if array.dtype != x.dtype:
            raise TypeError(f"{name}: got dtype {array.dtype}, expected x's {x.dtype}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x: got dtype {x.dtype}, expected a floating one")


def _check_plan(plan: SmlmPlan, rows: int) -> None:
    """The plan is for this many rows, and of one piece."""
    if plan.row_slot.shape != (rows,):
        raise ValueError(f"plan: got a plan of {plan.row_slot.shape[0]} rows, expected x's {rows}")
    if plan.tile_pages.ndim != 2:
        raise ValueError(f"plan.tile_pages: got shape {plan.tile_pages.shape}, expected 2 dimensions")
    tiles, pages = plan.tile_pages.shape
    expected = [a.shape for a in plan_shapes(rows, tiles, pages, plan.wide_len.shape[0])]
    for name, array, shape in zip(SmlmPlan._fields, plan, expected, strict=True):
        if array.shape != shape:
            raise ValueError(f"plan.{name}: got shape {array.shape}, expected {shape}")
        if array.dtype != np.int32:
            raise TypeError(f"plan.{name}: got dtype {array.dtype}, expected int32")


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _smlm(
    x: Array,
    A: Array,
    B: Array,
    y: Array | None,
    plan: SmlmPlan,
    out_features: tuple[int, ...],
    implementation: str,
) -> Array:
    function = smlm_triton if implementation == "triton" else smlm_xla
    return function(x, A, B, SmlmPlan(*map(jnp.asarray, plan)), out_features, y)


def _forward(
    x: Array,
    A: Array,
    B: Array,
    y: Array | None,
    plan: SmlmPlan,
    out_features: tuple[int, ...],
    implementation: str,
) -> tuple[Array, Any]:
    return _smlm(x, A, B, y, plan, out_features, implementation), (x, A, B, y is None, plan)


def _backward(out_features: tuple[int, ...], implementation: str, kept: Any, dout: Array) -> tuple[Any, ...]:
    """Gradients of the reference, in float32, cast to the dtypes of x, A and B; y's passes through."""
    x, A, B, no_y, plan = kept
    _, transpose = jax.vjp(lambda x, A, B: smlm_ref(x, A, B, plan, out_features), x, A, B)
    dx, dA, dB = transpose(dout.astype(jnp.float32))
    dplan = SmlmPlan(*(np.zeros(a.shape, jax.dtypes.float0) for a in plan))
    return dx, dA, dB, None if no_y else dout, dplan


_smlm.defvjp(_forward, _backward)
