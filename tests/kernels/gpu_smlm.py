"""What only a GPU can show of the SMLM kernels: one bit pattern, isolation, numerics of every shape class.

    python -m tests.kernels.gpu_smlm          # without pytest

`pytest -m gpu tests/kernels/test_smlm_triton.py` runs the same functions.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.smlm import SmlmPlan, build_plan, num_tiles_bound, num_wide_bound, smlm_ref
from pallas_kernels.smlm.gated import smlm_gated_triton
from pallas_kernels.smlm.plan import RANK_PAGE, WIDE
from pallas_kernels.smlm.triton import smlm_triton
from pallas_kernels.smlm.tuning import SmlmConfig, default_config

REPEATS = 1000
DECODE = [(i, 1, 1) for i in range(32)]  # (first row, rows, pages) of each adapter
MIXED = [(0, 500, 1), (512, 250, 4), (768, 33, 2), (820, 4, 1), (824, 1, 4), (825, 7, 8)]
Layout = list[tuple[int, int, int]]


@dataclass
class Problem:
    """One call on the device; every run has pages of its own."""

    x: jax.Array
    A: jax.Array
    B: jax.Array
    y: jax.Array
    segments: list[tuple[int, int, tuple[int, ...]]]
    out_features: tuple[int, ...]

    @property
    def max_pages(self) -> int:
        return max(len(pages) for _, _, pages in self.segments)

    def plan(self, segments: list[tuple[int, int, tuple[int, ...]]] | None = None) -> SmlmPlan:
        segments, rows = self.segments if segments is None else segments, self.x.shape[0]
        tiles, wide = (bound([rows], [len(self.segments)]) for bound in (num_tiles_bound, num_wide_bound))
        return build_plan(segments, rows, tiles, self.max_pages, wide)

    def config(self) -> SmlmConfig:
        return default_config(*self.x.shape, self.out_features, self.max_pages, self.x.dtype)

    def run(self, plan: SmlmPlan, config: SmlmConfig | None = None) -> np.ndarray:
        return np.asarray(smlm_triton(self.x, self.A, self.B, plan, self.out_features, self.y, config=config))


def make_problem(
    layout: Layout, size: int, out_features: tuple[int, ...], dtype: jnp.dtype = jnp.bfloat16
) -> Problem:
    rows, out = max(first + count for first, count, _ in layout) + 3, sum(out_features)
    segments, page = [], 1
    for first, count, pages in layout:
        segments.append((first, count, tuple(range(page, page + pages))))
        page += pages
    keys = jax.random.split(jax.random.key(size + out), 4)
    x, y = jax.random.normal(keys[0], (rows, size), dtype), jax.random.normal(keys[1], (rows, out), dtype)
    A = jax.random.normal(keys[2], (page, len(out_features) * RANK_PAGE, size), dtype) * dtype(size**-0.5)
    B = jax.random.normal(keys[3], (page, RANK_PAGE, out), dtype) * dtype(0.25)
    return Problem(x, A, B, y, segments, out_features)


def check_repeats(layout: Layout, size: int, out_features: tuple[int, ...], repeats: int = REPEATS) -> None:
    """`repeats` runs, all equal to the first, compared on the device."""
    problem = make_problem(layout, size, out_features)
    plan = jax.tree.map(jnp.asarray, problem.plan())

    def once() -> jax.Array:
        return smlm_triton(problem.x, problem.A, problem.B, plan, out_features, problem.y)

    first = once()
    differs = jax.jit(lambda count, a, b: count + jnp.any(a != b))
    count = jnp.int32(0)
    for _ in range(repeats):
        count = differs(count, first, once())
    if int(count):
        raise AssertionError(f"{int(count)} of {repeats} runs differ from the first")


def check_isolation(layout: Layout, size: int, out_features: tuple[int, ...]) -> None:
    """A segment's bits stay when others are reordered, removed, or full of NaN, and under any configuration."""
    problem = make_problem(layout, size, out_features)
    whole = problem.run(problem.plan())
    for first, count, pages in problem.segments:
        rows = slice(first, first + count)
        alone = problem.run(problem.plan([(first, count, pages)]))
        np.testing.assert_array_equal(alone[rows], whole[rows], err_msg=f"segment at {first}, alone")
    moved, places = permuted(problem)
    got = moved.run(moved.plan())
    for (first, count, _), place in zip(problem.segments, places, strict=True):
        np.testing.assert_array_equal(got[place : place + count], whole[first : first + count])
    first, count, pages = problem.segments[0]
    dirty = replace(
        problem, x=problem.x.at[first : first + count].set(jnp.nan), A=problem.A.at[pages[0]].set(jnp.nan)
    )
    got = dirty.run(dirty.plan())
    np.testing.assert_array_equal(got[first + count :], whole[first + count :])
    config = problem.config()
    for other in other_configs(config):
        np.testing.assert_array_equal(problem.run(problem.plan(), other), whole, err_msg=str(other))


def permuted(problem: Problem) -> tuple[Problem, list[int]]:
    """The segments in reverse order, each moved by one row more than it needs, and their new first rows."""
    rows, segments, places, at = np.zeros(problem.x.shape[0], np.int32), [], {}, 0
    for first, count, pages in problem.segments[::-1]:
        at = min(at + 1, rows.size - sum(n for f, n, _ in problem.segments if f not in places))
        rows[at : at + count] = first + np.arange(count)
        segments.append((at, count, pages))
        places[first], at = at, at + count
    moved = replace(problem, x=problem.x[rows], y=problem.y[rows], segments=segments)
    return moved, [places[first] for first, _, _ in problem.segments]


def other_configs(config: SmlmConfig) -> list[SmlmConfig]:
    """The same problem cut in other ways."""
    return [
        SmlmConfig(tile_rows=16, programs_k=4, block_k=64, block_n=64),
        SmlmConfig(tile_rows=16, programs_k=2, block_k=32, block_n=128, shrink_stages=2, group=2),
        SmlmConfig(tile_rows=WIDE, programs_k=2, block_k=32, block_n=64, shrink_stages=2),
        replace(config, reduce=not config.reduce, early=not config.early, branch=not config.branch),
    ]


def expected(problem: Problem) -> np.ndarray:
    """y plus the deltas in float32, 16 rows at a time: `smlm_ref` gathers the pages of every row."""
    want = np.array(problem.y.astype(jnp.float32))
    reference = jax.jit(smlm_ref, static_argnums=4)
    for first, count, pages in problem.segments:
        ids = np.array([0, *pages])
        for at in range(first, first + count, 16):
            rows = min(16, first + count - at)
            plan = build_plan([(0, rows, tuple(range(1, ids.size)))], rows, rows, ids.size - 1)
            args = (problem.x[at : at + rows], problem.A[ids], problem.B[ids], plan, problem.out_features)
            want[at : at + rows] += np.asarray(reference(*args))
    return want


def check_numerics(
    layout: Layout, size: int, out_features: tuple[int, ...], dtype: jnp.dtype = jnp.bfloat16
) -> None:
    """Against the definition in float32: worst error over the largest value."""
    problem = make_problem(layout, size, out_features, dtype)
    got, want = problem.run(problem.plan()).astype(np.float32), expected(problem)
    error, limit = float(np.abs(got - want).max() / np.abs(want).max()), 2**-7 if dtype == jnp.bfloat16 else 2**-16
    if not error < limit:
        raise AssertionError(f"got an error of {error}, expected less than {limit}")


def check_gated(layout: Layout, size: int, half: int, dtype: jnp.dtype, repeats: int = 100) -> None:
    """gate and up have the bits of `smlm`, every time; the product is the formula's, with the quick silu."""
    problem = make_problem(layout, size, (half, half), dtype)
    plan, rows = jax.tree.map(jnp.asarray, problem.plan()), problem.x.shape[0]

    def once() -> jax.Array:
        return smlm_gated_triton(problem.x, problem.A, problem.B, plan, problem.y, "silu", rows)

    found = once()
    y = problem.run(problem.plan())
    np.testing.assert_array_equal(np.asarray(found.kept), y)
    gate, up = (half.astype(np.float64) for half in np.split(y, 2, axis=1))
    want = gate / (1 + np.exp(-gate)) * up
    error = float(np.max(np.abs(np.asarray(found.out, np.float64) - want) / (np.abs(want) + 1e-3)))
    if not error < (limit := 2**-7 if dtype == jnp.bfloat16 else 2**-18):
        raise AssertionError(f"got an error of {error}, expected less than {limit}")
    differs = jax.jit(lambda a, b: jnp.any(a != b))
    for number in range(repeats):
        if int(differs(once().out, found.out)):
            raise AssertionError(f"run {number} differs from the first")


SHAPES = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
    "odd": (896, (4864, 160)),
}
LAYOUTS = {"decode": DECODE, "mixed": MIXED}
CHECKS: dict[str, Callable[[], None]] = {
    **{
        f"numerics/{shape}/{layout}/{dtype.__name__}": lambda s=shape, n=layout, d=dtype: check_numerics(
            LAYOUTS[n], *SHAPES[s], d
        )
        for shape in SHAPES
        for layout in LAYOUTS
        for dtype in (jnp.bfloat16, jnp.float32)
    },
    **{
        f"isolation/{shape}/{layout}": lambda s=shape, n=layout: check_isolation(LAYOUTS[n], *SHAPES[s])
        for shape, layout in (("qkv", "decode"), ("qkv", "mixed"), ("odd", "mixed"))
    },
    **{
        f"gated/{half}/{layout}/{dtype.__name__}": lambda h=half, n=layout, d=dtype: check_gated(LAYOUTS[n], 4096, h, d)
        for half, layout in ((14336, "mixed"), (4864, "mixed"), (14336, "decode"))
        for dtype in (jnp.bfloat16, jnp.float32)
    },
    **{
        f"repeats/{shape}/{layout}": lambda s=shape, n=layout: check_repeats(LAYOUTS[n], *SHAPES[s])
        for shape, layout in (("o", "decode"), ("qkv", "mixed"))
    },
}


def main() -> int:
    failed = 0
    for name, check in CHECKS.items():
        start = time.perf_counter()
        try:
            check()
            outcome = "ok"
        except Exception as error:  # every check is run, and named
            failed, outcome = failed + 1, f"FAILED {type(error).__name__}: {error}"
        print(f"{name}: {outcome} ({time.perf_counter() - start:.1f} s)", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
