"""Cases of the SMLM ops and brute-force answers: numpy in float64, one segment and one page at a time."""

from dataclasses import dataclass, replace
from functools import partial

import jax.numpy as jnp
import numpy as np

from pallas_kernels.smlm import RANK_PAGE, SmlmPlan, build_plan

Segments = list[tuple[int, int, tuple[int, ...]]]


@dataclass
class Case:
    """One call of the op."""

    x: np.ndarray
    A: np.ndarray
    B: np.ndarray
    y: np.ndarray
    plan: SmlmPlan
    segments: Segments
    out_features: tuple[int, ...]


def make_case(
    segments: Segments,
    rows: int,
    size: int,
    out_features: tuple[int, ...],
    *,
    max_pages: int = 3,
    num_tiles: int = 16,
    num_wide: int | None = None,
    num_pages: int = 9,
    dtype: np.dtype | type = np.float32,
    seed: int = 0,
) -> Case:
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (np.float32(scale) * rng.standard_normal(shape, np.float32)).astype(dtype)

    A = normal(num_pages, len(out_features) * RANK_PAGE, size, scale=size**-0.5)
    B = normal(num_pages, RANK_PAGE, sum(out_features), scale=0.25)
    A[0], B[0] = 0, 0
    return Case(
        x=normal(rows, size),
        A=A,
        B=B,
        y=normal(rows, sum(out_features)),
        plan=build_plan(segments, rows, num_tiles, max_pages, num_wide),
        segments=segments,
        out_features=out_features,
    )


def training(plan: SmlmPlan, rows: int) -> SmlmPlan:
    """The plan with its leading rows as one pack, whose S is kept."""
    return replace(plan, pack_pages=np.zeros((int(rows > 0), plan.tile_pages.shape[1]), np.int32), pack_rows=rows)


def brute_force(case: Case) -> np.ndarray:
    """The delta by the formula, float64; knows segments, not plans."""
    delta = np.zeros(case.y.shape, np.float64)
    for first, rows, pages in case.segments:
        own = slice(first, first + rows)
        x = case.x[own].astype(np.float64)
        for page in pages:
            A, B, start = case.A[page].astype(np.float64), case.B[page].astype(np.float64), 0
            for i, size in enumerate(case.out_features):
                A_i, columns = A[i * RANK_PAGE : (i + 1) * RANK_PAGE], slice(start, start + size)
                delta[own, columns] += (x @ A_i.T) @ B[:, columns]
                start += size
    return delta


def brute_S(case: Case, rows: int) -> np.ndarray:
    """S by the formula, float64; [rows, n, MP, R], zero where there is no page."""
    S = np.zeros((rows, len(case.out_features), case.plan.tile_pages.shape[1], RANK_PAGE))
    for first, count, pages in case.segments:
        own = slice(first, min(rows, first + count))
        x = case.x[own].astype(np.float64)
        for m, page in enumerate(pages):
            S[own, :, m] = (x @ case.A[page].astype(np.float64).T).reshape(len(x), len(case.out_features), RANK_PAGE)
    return S


def rows_of_nobody(case: Case) -> np.ndarray:
    """The rows that no adapter owns."""
    owned = np.zeros(len(case.x), bool)
    for first, rows, pages in case.segments:
        owned[first : first + rows] = bool(pages)
    return np.flatnonzero(~owned)


# Mixed ranks, a long run, single rows, gaps, a segment without adapter, runs that end off a tile boundary.
MIXED: Segments = [
    (0, 70, (1, 2)),
    (70, 5, ()),
    (75, 1, (3,)),
    (76, 3, (3,)),
    (80, 16, (4, 5, 6)),
    (96, 17, (7,)),
]
MIXED_ROWS = 118

CASES = {
    "one target": partial(make_case, MIXED, MIXED_ROWS, 64, (48,)),
    "targets": partial(make_case, MIXED, MIXED_ROWS, 48, (64, 16, 16)),
    "two halves": partial(make_case, MIXED, MIXED_ROWS, 48, (80, 80)),
    # 1040 is no multiple of spans or blocks, and 6 pages are more than one product takes side by side.
    "long": partial(
        make_case, [*MIXED, (113, 5, (8, 7, 6, 5, 4, 3))], MIXED_ROWS, 1040, (80, 16, 16), max_pages=6
    ),
    "one page an adapter": partial(
        make_case, [(0, 3, (1,)), (3, 1, ()), (4, 20, (2,)), (31, 1, (3,))], 32, 64, (48,), max_pages=1
    ),
    "nobody": partial(make_case, [], 16, 64, (48,), max_pages=1),
    "bf16": partial(make_case, MIXED, MIXED_ROWS, 64, (32, 16), dtype=jnp.bfloat16),
}
"""Name -> () -> Case: what every implementation of the op is run over."""
