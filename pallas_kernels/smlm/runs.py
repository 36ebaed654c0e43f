"""The backward of SMLM for any plan: gradients per run, of pages read through the plan."""

from collections.abc import Callable

from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.common.checks import check_dtype, check_rank, check_shapes
from pallas_kernels.common.implementation import choose
from pallas_kernels.smlm.backward import between_halves
from pallas_kernels.smlm.plan import RANK_PAGE, SmlmPlan
from pallas_kernels.smlm.run_list import runs_of
from pallas_kernels.smlm.runs_triton import runs_dy_triton, runs_x_triton
from pallas_kernels.smlm.runs_xla import runs_dy_xla, runs_x_xla

Rows = Float[Array, "T in"]


def backward_runs(
    S: Float[Array, "T n MP R"],
    x: Float[Array, "T in"],
    A: Float[Array, "P nR in"],
    B: Float[Array, "P R out"],
    plan: SmlmPlan,
    dy: Float[Array, "T out"],
    *,
    out_features: tuple[int, ...],
    dx: Rows | Callable[[Array], Rows] | None = None,
    implementation: str | None = None,
) -> tuple[Rows, Float32[Array, "G MP nR in"], Float32[Array, "G MP R out"], Int32[Array, "G MP"]]:
    """The gradients of the delta S B, S = x A^T: dX = dY B^T A, and of every run dA and dB.

    A run is a longest stretch of neighbouring rows of one adapter. Its gradients are sums over its rows alone, in an
    order that depends on their number alone; two runs of one adapter are two groups, which nothing here adds up.
    Operands are in x's dtype (dS = dY B^T is rounded to it), sums in float32.

    Args:
        S: x A^T of all rows, as the forward kept it; 0 where a row has no such page.
        x: Inputs of the forward.
        A, B: Pages, x's dtype. Page 0 means none, and decides nothing.
        plan: The forward's.
        dy: Gradient of the delta; it is taken in x's dtype.
        out_features: Columns of each target.
        dx: What dX is added to, x's dtype: an array, which the kernels write in place where XLA may reuse the buffer;
            or a function of dy that gives it, called between the half that reads dy and the half that reads x, so
            that dy is still in the cache; or None for 0.
        implementation: "xla", "triton", or None for triton on a GPU and xla elsewhere.

    Returns:
        dX: of rows without adapter dx, bit for bit.
        dA, dB: by run and page, never rounded. G is the smaller of the plan's capacities of tiles and wide tiles.
        pages: Of every run; 0 where it has none, and where there is no run. **What dA and dB hold there is
            undefined** (0 of "xla", of "triton" whatever the memory held), as the pool's page 0 is.

    Raises:
        ValueError: shapes disagree, the implementation is unknown, or the kernels cannot address an operand.
        TypeError: A's, B's, S's or dx's dtype is not x's.
    """
    out_features = tuple(int(size) for size in out_features)
    _check(S, x, A, B, plan, dy, out_features)
    dy_half, x_half = (
        (runs_dy_triton, runs_x_triton)
        if choose(implementation) == "triton"
        else (runs_dy_xla, runs_x_xla)
    )
    runs = runs_of(plan)
    dS, dB = dy_half(B, S, dy, plan, runs, out_features)
    dS, dx = between_halves(dS, dy, dx, x)
    dX, dA = x_half(x, A, dS, dx, plan, runs)
    return dX, dA, dB, runs.pages


def _check(S: Array, x: Array, A: Array, B: Array, plan: SmlmPlan, dy: Array, out_features: tuple[int, ...]) -> None:
    """Every array has the shape that x, the pools and out_features imply, and x's dtype."""
    for name, array, rank in (("x", x, 2), ("A", A, 3), ("plan.tile_pages", plan.tile_pages, 2)):
        check_rank(name, array, rank)
    (rows, size), pages, n, out = x.shape, plan.tile_pages.shape[1], len(out_features), sum(out_features)
    check_shapes(
        S=(S, (rows, n, pages, RANK_PAGE)),
        A=(A, (A.shape[0], n * RANK_PAGE, size)),
        B=(B, (A.shape[0], RANK_PAGE, out)),
        dy=(dy, (rows, out)),
        **{"plan.row_slot": (plan.row_slot, (rows,))},
    )
    for name, array in (("S", S), ("A", A), ("B", B)):
        check_dtype(name, array, "x", x.dtype)

