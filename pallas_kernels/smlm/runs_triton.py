"""The backward of runs as two Pallas-Triton launches, using the pack kernels with rows and pages read from lists.

The first reads dY and computes dB = S^T dY by runs and partial sums of dS = dY B^T by wide tiles. The second reads x
and computes dA = dS^T x by runs and dX = dS A by wide tiles, in place.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Float32

from pallas_kernels.common.implementation import interpreted
from pallas_kernels.smlm.pack_kernels import dS_share, dX_tile, gradient
from pallas_kernels.smlm.pack_sides import Cut, ListedSide
from pallas_kernels.smlm.pack_triton import Work, add_shares, check_elements, launch, rows_of
from pallas_kernels.smlm.pack_tuning import DyConfig, XConfig, default_runs_dy_config, default_x_config
from pallas_kernels.smlm.plan import RANK_PAGE, WIDE, SmlmPlan
from pallas_kernels.smlm.run_list import Runs

F32 = jnp.float32
RUNS = ("run_row", "run_len", "run_pages")
TILES = ("tile_row", "tile_len", "tile_pages")


# Jitted so that the layers of a model trace and lower the kernels once per shape.
@functools.partial(jax.jit, static_argnames=("out_features", "config", "interpret"))
def runs_dy_triton(
    B: Float[Array, "P R out"],
    S: Float[Array, "T n MP R"],
    dy: Float[Array, "T out"],
    plan: SmlmPlan,
    runs: Runs,
    out_features: tuple[int, ...],
    *,
    config: DyConfig | None = None,
    interpret: bool | None = None,
) -> tuple[Float[Array, "T MP nR"], Float32[Array, "G MP R out"]]:
    """dS = dY B^T, rounded to S's dtype, and dB = S^T dY by runs.

    Both are undefined for the absent pages of a row or run.

    Raises:
        ValueError: an operand or dB has 2^31 elements or more.
    """
    (rows, targets, pages, _), out = S.shape, sum(out_features)
    interpret = interpreted(interpret)
    config = config or default_runs_dy_config(out_features, pages, S.dtype)
    of_runs, of_tiles = _sides(plan, runs, out_features, RANK_PAGE)
    flat = rows_of(S.dtype, B=B, dY=dy, S=S.reshape(rows, -1))
    outs = {
        "dB": jax.ShapeDtypeStruct((of_runs.packs * of_runs.ranks, out), F32),
        "shares": jax.ShapeDtypeStruct((of_tiles.blocks(config.dS.span), rows, of_tiles.ranks), F32),
    }
    check_elements(dy=dy, B=B, dB=outs["dB"])
    works = []
    for ranks in of_runs.windows:
        dB, dS = Cut(of_runs, config.dB, ranks), Cut(of_tiles, config.dS, ranks)
        works.append(Work(gradient, dB, dB.strips, ("dY", "S", "dB")))
        works.append(Work(dS_share, dS, dS.tiles, ("dY", "B", "shares")))
    params = plt.CompilerParams(num_warps=config.warps, num_stages=config.stages)
    found = launch("runs_backward_dy", works, flat | _lists(plan, runs), outs, params, interpret, turns=config.turns)
    dS = add_shares(found["shares"], of_tiles, config.dS.span).astype(S.dtype)
    return dS.reshape(rows, pages, targets * RANK_PAGE), found["dB"].reshape(of_runs.packs, pages, RANK_PAGE, out)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def runs_x_triton(
    x: Float[Array, "T in"],
    A: Float[Array, "P nR in"],
    dS: Float[Array, "T MP nR"],
    dx: Float[Array, "T in"] | None,
    plan: SmlmPlan,
    runs: Runs,
    *,
    config: XConfig | None = None,
    interpret: bool | None = None,
) -> tuple[Float[Array, "T in"], Float32[Array, "G MP nR in"]]:
    """dX = dx + dS A, rounded once, in place of dx if given; and dA = dS^T x by runs.

    Raises:
        ValueError: an operand or dA has 2^31 elements or more.
    """
    (rows, size), (_, pages, page_ranks) = x.shape, dS.shape
    interpret = interpreted(interpret)
    # Without dx, rows without adapter must be set to zero, so their tiles need work too.
    of_runs, of_tiles = _sides(plan, runs, (size,), page_ranks, bare=dx is None)
    config = config or default_x_config(of_runs.ranks, x.dtype)
    given = {} if dx is None else {"dx": dx}
    flat = rows_of(x.dtype, x=x, A=A, dS=dS.reshape(rows, -1), **given)
    outs = {
        "dA": jax.ShapeDtypeStruct((of_runs.packs * of_runs.ranks, size), F32),
        "dX": jax.ShapeDtypeStruct(x.shape, x.dtype),
    }
    check_elements(x=x, A=A, dA=outs["dA"])
    works = []
    for ranks in of_runs.windows:
        dA = Cut(of_runs, config.dA, ranks)
        works.append(Work(gradient, dA, dA.strips, ("x", "dS", "dA")))
    dX = Cut(of_tiles, config.dX, of_tiles.chunks)
    works.append(Work(dX_tile, dX, dX.tiles, ("dS", "A", *given, "dX")))
    params = plt.CompilerParams(num_warps=config.warps, num_stages=config.stages)
    in_place = {"dX": "dx"} if given else None
    found = launch("runs_backward_x", works, flat | _lists(plan, runs), outs, params, interpret, in_place)
    return found["dX"], found["dA"].reshape(of_runs.packs, pages, page_ranks, size)


def _lists(plan: SmlmPlan, runs: Runs) -> dict[str, Array]:
    """The list operands named by RUNS and TILES."""
    lists = zip(RUNS, (runs.row, runs.length, runs.pages), strict=True)
    wide = zip(TILES, (plan.wide_row, plan.wide_len, plan.wide_pages), strict=True)
    return {**dict(lists), **{name: jnp.asarray(a) for name, a in wide}}


def _sides(
    plan: SmlmPlan, runs: Runs, sizes: tuple[int, ...], page_ranks: int, bare: bool = False
) -> tuple[ListedSide, ListedSide]:
    """The tall operand by runs and by wide tiles; `bare` includes wide tiles without adapter."""
    (entries, pages), ranks = runs.pages.shape, runs.pages.shape[1] * page_ranks
    # Wide tiles with adapters come first, and each has at least one tile, so the smaller capacity bounds their number.
    tiles = plan.wide_row.shape[0] if bare else entries
    by_runs = ListedSide(entries, WIDE, sizes, ranks, page_ranks, pages, RUNS)
    return by_runs, ListedSide(tiles, WIDE, sizes, ranks, page_ranks, pages, TILES, bare)
