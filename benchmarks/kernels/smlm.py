"""SMLM alone, on one GPU: the peers' cases, the projection groups of an 8B model, mixed ranks; forward and backward.

    python -m benchmarks.kernels.smlm            # writes benchmarks/results/<device>/smlm.json
    python -m benchmarks.kernels.plot_smlm       # draws it

`fwd_us` is measured as the peers were (pages cold, x and y the same arrays in every call), `fwd_cold_us` with x and y
rotated too. Before anything is timed every case's result is compared with plain XLA's.
"""

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.kernels.smlm_chain import GROUPS, PEERS, Bench, Case, Timing, make_case, worst_error
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
    "bwd_us": "dX, dA, dB, S kept; pages, S, dA and dB of every call its own and cold, x and dY the same arrays",
    "bwd_cold_us": "the same with x and dY rotated too",
    "bwd_xla_us, bwd_torch_us": "plain XLA in the same chain; matmuls, bf16 gradients, CUDA graph",
    "bound": "bytes of x, y in and out, A and B over 3.2 TB/s: cold memory",
}


def triton_call(config: SmlmConfig | None = None) -> Callable[..., Any]:
    return lambda x, A, B, plan, out, y: smlm_triton(x, A, B, plan, out, y, config=config)


def check(bench: Bench) -> None:
    """Ends the program where the kernels and plain XLA disagree."""
    error = float(worst_error(*(bench.result(f) for f in (triton_call(), smlm_xla))))
    if not error < 2**-7:
        raise SystemExit(f"{bench.case.name}: error {error}, expected less than {2**-7}")


def timings(case: Case, bench: Bench, *, ours: bool) -> list[Timing]:
    """The default configuration as the peers were timed and all cold, and plain XLA; for a rank mix its parts too."""
    floor, call = {"bound": case.floor_us}, triton_call()
    guess = PEERS.get(case.name, (None, 2 * case.floor_us + 5))[1]
    peer = dict(zip(("peer", "peer_value"), PEERS.get(case.name, ()), strict=False))
    found = [Timing(case.name, "fwd_us", bench, call, guess, floor | peer)]
    if len(set(case.ranks)) > 1:
        for i, rank in enumerate(case.ranks):
            found.append(Timing(f"{case.name}/rank{rank}", "fwd_us", Bench(case.part(i)), call, 10.0))
        return found
    found.append(Timing(case.name, "fwd_cold_us", Bench(case, cold=True), call, guess, floor))
    if not ours:
        found.append(Timing(case.name, "xla_us", Bench(case, max_calls=32), smlm_xla, 2 * guess, repeats=3))
    return found


def forward_records(names: list[str], *, ours: bool = False) -> list[dict[str, Any]]:
    """Checks and compiles all cases side by side, then times them one after the other.

    Args:
        names: Paths of cases.
        ours: Time the kernels alone, and neither XLA nor torch.
    """
    cases = [make_case(name) for name in names]
    benches = [Bench(case) for case in cases]
    todo = [timings(case, bench, ours=ours) for case, bench in zip(cases, benches, strict=True)]
    with ThreadPoolExecutor(16) as pool:
        jobs = [pool.submit(check, bench) for bench in benches]
        jobs += [pool.submit(timing.compile) for some in todo for timing in some]
        for job in jobs:
            job.result()
    records: list[dict[str, Any]] = []
    for case, some in zip(cases, todo, strict=True):
        new = [timing.record() for timing in some]
        if len(set(case.ranks)) > 1:
            total = sum(r["value"] for r in new[1:])
            new.append(record(f"smlm/{case.name}", "parts_sum_us", total, "us"))
        peers = {} if ours else time_torch(case)
        new += [record(f"smlm/{case.name}", metric, value, "us") for metric, value in peers.items()]
        print(case.name, [(r["metric"], round(r["value"], 2)) for r in new], "peer", PEERS.get(case.name), flush=True)
        records += new
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--cases", nargs="*", help="case paths; by default the peers', the 8B groups, the rank mixes")
    parser.add_argument("--forward", action="store_true", help="leave the backward out")
    parser.add_argument("--ours", action="store_true", help="the kernels alone, to compare two commits")
    options = parser.parse_args()
    records = forward_records(options.cases or [*PEERS, *GROUP_CASES, *RANK_MIXES], ours=options.ours)
    if not options.forward:
        from benchmarks.kernels.smlm_backward import backward_records

        records += backward_records(ours=options.ours)
    print(write("smlm", CONFIG, records, options.results))


if __name__ == "__main__":
    main()
