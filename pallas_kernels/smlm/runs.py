"""The backward of SMLM for arbitrary plans, with gradients per run."""

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
    """The gradients of the delta S B, S = x A^T: dX = dY B^T A, and dA and dB of every run.

    A run is a maximal range of adjacent rows with the same adapter. Its gradients are sums over its rows, in an order
    that depends only on their number. Two runs of one adapter are separate groups, which are not added up here.
    Operands are in x's dtype (dS = dY B^T is rounded to it), sums in float32.

    Args:
        S: x A^T of all rows, as kept by the forward; 0 for absent pages.
        x: Inputs of the forward.
        A, B: Pages, x's dtype. Page 0 means none; its contents do not matter.
        plan: The forward's plan.
        dy: Gradient of the delta; cast to x's dtype.
        out_features: Columns of each target.
        dx: Added to dX, in x's dtype: an array, which the kernels overwrite if XLA may reuse its buffer; a function
            of dy that returns it, called between the half that reads dy and the half that reads x, while dy is still
            in the cache; or None for 0.
        implementation: "xla", "triton", or None for triton on a GPU and xla elsewhere.

    Returns:
        dX: equal to dx, bit for bit, in rows without adapter.
        dA, dB: by run and page, never rounded. G is the smaller of the plan's capacities in tiles and wide tiles.
        pages: Pages of every run; 0 for absent pages and unused runs. **There, dA and dB are undefined** (0 for
            "xla", uninitialised memory for "triton"), like the pool's page 0.

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
    """Checks that every array has the shape implied by x, the pools and out_features, and x's dtype."""
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

