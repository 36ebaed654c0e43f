"""The backward of any plan alone, on one GPU: random segments of many adapters, against the path of equal packs.

    python -m benchmarks.kernels.smlm_runs      # prints the records; benchmarks.kernels.smlm writes them

Timed as `smlm_backward` does. `bwd_runs_us` has runs of random lengths, an adapter each; `bwd_packs_us` as many packs
of equal lengths, which are the same rows, pages and gradients; `bwd_pack_us` one pack of all rows, one adapter. Before
anything is timed the result is compared with plain XLA's.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels import smlm_backward
from benchmarks.kernels.smlm_backward import F32, MAX_CALLS, Bench, Case, packs_triton
from benchmarks.kernels.smlm_chain import GROUPS, Timing, noise, worst_error
from pallas_kernels.smlm import RANK_PAGE, SmlmPlan, build_plan, num_tiles_bound, num_wide_bound
from pallas_kernels.smlm.runs import backward_runs

RUNS = 32


@dataclass(frozen=True)
class RunsCase(Case):
    """ROWS rows of `packs` adapters: as runs of random lengths, or as packs of equal ones."""

    @property
    def rows(self) -> int:
        return smlm_backward.ROWS // self.packs

    def plan(self) -> SmlmPlan:
        """With the capacity that any step of as many rows and runs needs."""
        rng, rows = np.random.default_rng(0), self.packs * self.rows
        ends = np.sort(rng.choice(np.arange(1, rows), self.packs - 1, replace=False))
        firsts, pages = [0, *ends.tolist()], 1 + rng.permutation(self.packs * self.pages).reshape(self.packs, -1)
        lengths = np.diff([*firsts, rows]).tolist()
        segments = [(*own, tuple(page.tolist())) for *own, page in zip(firsts, lengths, pages, strict=True)]
        tiles, wide = (f([rows], [self.packs]) for f in (num_tiles_bound, num_wide_bound))
        return build_plan(segments, rows, tiles, self.pages, wide)


class RunsBench(Bench):
    """The same arrays with the rows in one piece, pages in pools, gradients by runs."""

    def __init__(self, case: RunsCase, *, cold: bool = False, max_calls: int = MAX_CALLS) -> None:
        self.case, self.calls = case, min(case.calls, max(max_calls, 2 * case.copies))
        copies, n, out = case.copies if cold else 1, len(case.outs), sum(case.outs)
        rows, pool, plan = case.packs * case.rows, 1 + case.packs * case.pages, case.plan()
        A = noise(2, self.calls, pool, n * RANK_PAGE, case.size, scale=case.size**-0.5)
        B = noise(3, self.calls, pool, RANK_PAGE, out, scale=out**-0.5)
        S = noise(4, self.calls, rows, n, case.pages, RANK_PAGE)
        groups = (min(plan.tile_row.shape[0], plan.wide_row.shape[0]), case.pages)
        grads = [tuple(jnp.zeros((*groups, *a.shape[1:]), F32) for a in pair) for pair in zip(A, B, strict=True)]
        self.state = (noise(0, copies, rows, case.size), grads)
        self.plan = jax.tree.map(jnp.asarray, plan)
        self.args = (noise(1, copies, rows, out), A, B, S)

    def call(self, function: Callable[..., Any], *arrays: Any) -> tuple[Any, Any, Any]:
        """dX, dA, dB of (x, dY, A, B, S)."""
        x, dy, A, B, S = arrays
        return function(S, x, A, B, self.plan, dy, out_features=self.case.outs)[:3]

    def check(self) -> None:
        """Ends the program where the kernels and plain XLA disagree."""
        first = (self.state[0][0], *(arrays[0] for arrays in self.args))
        both = [partial(backward_runs, implementation=name) for name in ("triton", "xla")]
        found = [jax.jit(partial(self.call, function))(*first) for function in both]
        # Only the first entries of the list are runs.
        found = [(dX, dA[: self.case.packs], dB[: self.case.packs]) for dX, dA, dB in found]
        for name, got, want in zip(("dX", "dA", "dB"), *found, strict=True):
            error = float(worst_error(got, want))
            if not error < 2**-7:
                raise SystemExit(f"{self.case.name}: {name} has error {error}, expected less than {2**-7}")


def make_cases() -> list[RunsCase]:
    """The groups of an 8B model: qkv at two ranks, the others at one."""
    shapes = {"qkv/r16": ("qkv", 16), "qkv/r64": ("qkv", 64), "gate_up/r16": ("gate_up", 16), "down/r16": ("down", 16)}
    return [RunsCase(f"{name}/runs1024/n{RUNS}", RUNS, *GROUPS[of], rank) for name, (of, rank) in shapes.items()]


def timings(case: RunsCase) -> list[Timing]:
    """Checks a case and compiles all of it."""
    one, found = Case(case.name, 1, case.size, case.outs, case.rank), []
    runs = partial(backward_runs, implementation="triton")
    for cold, us in ((False, "us"), (True, "cold_us")):
        bench, guess = RunsBench(case, cold=cold), 2 * case.floor_us + 10
        found.append(Timing(case.name, f"bwd_runs_{us}", bench, runs, guess, {"bound": case.floor_us}))
        for metric, packs in (("packs", case), ("pack", one)):
            bench = Bench(packs, cold=cold)
            found.append(Timing(case.name, f"bwd_{metric}_{us}", bench, packs_triton, guess))
    found[0].bench.check()
    for timing in found:
        timing.compile()
    return found


def runs_records(cases: list[RunsCase] | None = None) -> list[dict[str, Any]]:
    """Checks and compiles all cases side by side, then times them one after the other.

    Args:
        cases: By default all.

    Returns:
        Records for smlm.json; prints a line a case.
    """
    records: list[dict[str, Any]] = []
    cases = make_cases() if cases is None else cases
    with ThreadPoolExecutor(16) as pool:
        todo = list(pool.map(timings, cases))
    for case, some in zip(cases, todo, strict=True):
        new = [timing.record() for timing in some]
        print(case.name, [(r["metric"], round(r["value"], 1)) for r in new], f"floor {case.floor_us:.1f}", flush=True)
        records += new
    return records


if __name__ == "__main__":
    runs_records()
