"""SMLM alone, on one GPU: the peers' cases, the projection groups of an 8B model, mixed ranks; forward and backward.

    python -m benchmarks.kernels.smlm            # writes benchmarks/results/<device>/smlm.json
    python -m benchmarks.kernels.plot_smlm       # draws it

`fwd_us` is measured as the peers were (pages cold, x and y the same arrays in every call), `fwd_cold_us` with x and y
rotated too. Before a case is timed its result is compared with plain XLA's.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.kernels.smlm_chain import GROUPS, PEERS, Bench, Case, make_case
from benchmarks.kernels.smlm_torch import time_torch
from benchmarks.results import record, write
from pallas_kernels.smlm.triton import smlm_triton
from pallas_kernels.smlm.tuning import SmlmConfig
from pallas_kernels.smlm.xla import smlm_xla

GROUP_CASES = [f"{g}/r16/{b}" for g in GROUPS for b in ("dec32/n4", "dec32/n32", "mixed/n11")]
RANK_MIXES = ["4096x4096/r8-128/dec40/n5", "4096x4096/r8-128/pre2560/n5"]
CONFIG = {
    "dtype": "bfloat16",
    "fwd_us": "chain of calls in a device loop, pages of every call its own and cold, x and y the same arrays",
    "fwd_cold_us": "the same with x and y rotated too",
    "xla_us": "gather-einsum, same chain",
    "torch_us": "CUDA graph, pages rotated; peft_loop: one pair of matmuls an adapter, added into y",
    "parts_sum_us": "rank mix: its adapters timed one at a time, summed",
    "bound": "bytes of x, y in and out, A and B over 3.2 TB/s: cold memory",
}


def triton_call(config: SmlmConfig | None = None) -> Callable[..., Any]:
    return lambda x, A, B, plan, out, y: smlm_triton(x, A, B, plan, out, y, config=config)


@jax.jit
def worst_error(got: jax.Array, want: jax.Array) -> jax.Array:
    """Largest difference over the largest magnitude."""
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return jnp.abs(got - want).max() / jnp.abs(want).max()


def time_forward(bench: Bench, function: Callable[..., Any], guess_us: float, repeats: int = 7) -> float:
    plan, loops = bench.plan(), bench.loops(guess_us)
    return bench.time_us(bench.compile(function, plan, loops), plan, loops, repeats=repeats)


def check(bench: Bench) -> None:
    """Ends the program where the kernels and plain XLA disagree."""
    error = float(worst_error(*(bench.result(f, bench.plan()) for f in (triton_call(), smlm_xla))))
    if not error < 2**-7:
        raise SystemExit(f"{bench.case.name}: error {error}, expected less than {2**-7}")


def bench_case(case: Case) -> list[dict[str, Any]]:
    """Checks, then times, the default configuration, plain XLA and torch."""
    bench, name = Bench(case), f"smlm/{case.name}"
    check(bench)
    guess = PEERS.get(case.name, (None, 2 * case.floor_us + 5))[1]
    peer = dict(zip(("peer", "peer_value"), PEERS.get(case.name, ()), strict=False))
    us = time_forward(bench, triton_call(), guess)
    records = [record(name, "fwd_us", us, "us", bound=case.floor_us, **peer)]
    cold_us = time_forward(Bench(case, cold=True), triton_call(), guess)
    records.append(record(name, "fwd_cold_us", cold_us, "us", bound=case.floor_us))
    few = Bench(case, max_calls=32)
    records.append(record(name, "xla_us", time_forward(few, smlm_xla, 2 * guess, repeats=3), "us"))
    for metric, value in time_torch(case).items():
        records.append(record(name, metric, value, "us"))
    return records


def bench_ranks(case: Case) -> list[dict[str, Any]]:
    """A batch of several ranks, and its adapters one at a time: a rank must not pay for a larger one beside it."""
    bench, name = Bench(case), f"smlm/{case.name}"
    check(bench)
    us = time_forward(bench, triton_call(), 20.0)
    parts = [time_forward(Bench(case.part(i)), triton_call(), 10.0) for i in range(len(case.runs))]
    records = [record(name, "fwd_us", us, "us", bound=case.floor_us)]
    records.append(record(name, "parts_sum_us", sum(parts), "us"))
    for rank, part in zip(case.ranks, parts, strict=True):
        records.append(record(f"{name}/rank{rank}", "fwd_us", part, "us"))
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--cases", nargs="*", help="case paths; by default the peers', the 8B groups, the rank mixes")
    parser.add_argument("--forward", action="store_true", help="leave the backward out")
    options = parser.parse_args()
    records: list[dict[str, Any]] = []
    for name in options.cases or [*PEERS, *GROUP_CASES, *RANK_MIXES]:
        case = make_case(name)
        new = (bench_ranks if len(set(case.ranks)) > 1 else bench_case)(case)
        print(name, {r["metric"]: round(r["value"], 2) for r in new}, "peer", PEERS.get(name), flush=True)
        records += new
    if not options.forward:
        from benchmarks.kernels.smlm_backward import backward_records

        records += backward_records()
    print(write("smlm", CONFIG, records, options.results))


if __name__ == "__main__":
    main()
