"""Cases and a brute-force answer for the SMLM tests: numpy in float64, one row and one page at a time."""

from dataclasses import dataclass

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
    num_pages: int = 9,
    dtype: np.dtype | type = np.float32,
    seed: int = 0,
) -> Case:
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.normal(size=shape)).astype(dtype)

    A = normal(num_pages, len(out_features) * RANK_PAGE, size, scale=size**-0.5)
    B = normal(num_pages, RANK_PAGE, sum(out_features), scale=0.25)
    A[0], B[0] = 0, 0
    return Case(
        x=normal(rows, size),
        A=A,
        B=B,
        y=normal(rows, sum(out_features)),
        plan=build_plan(segments, rows, num_tiles, max_pages),
        segments=segments,
        out_features=out_features,
    )


def brute_force(case: Case) -> np.ndarray:
    """The delta by the formula, float64; knows segments, not plans."""
    x, A, B = (a.astype(np.float64) for a in (case.x, case.A, case.B))
    delta = np.zeros(case.y.shape, np.float64)
    for first, rows, pages in case.segments:
        for t in range(first, first + rows):
            for page in pages:
                start = 0
                for i, size in enumerate(case.out_features):
                    A_i = A[page, i * RANK_PAGE : (i + 1) * RANK_PAGE]
                    delta[t, start : start + size] += (A_i @ x[t]) @ B[page, :, start : start + size]
                    start += size
    return delta


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
