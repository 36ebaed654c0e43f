"""SMLM alone, on one GPU: the peers' cases and the projection groups of an 8B model; forward and backward.

    python -m benchmarks.kernels.smlm            # writes benchmarks/results/<device>/smlm.json

Before a case is timed its result is compared with plain XLA's.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels.smlm_chain import BF16, GROUPS, PEERS, Bench, Case, make_case
from benchmarks.results import record, write
from pallas_kernels.smlm import RANK_PAGE, pack_lora
from pallas_kernels.smlm.triton import smlm_triton
from pallas_kernels.smlm.tuning import SmlmConfig, default_config
from pallas_kernels.smlm.xla import smlm_xla


def default_of(bench: Bench) -> SmlmConfig:
    """The configuration that the case's rows would get, although x holds several copies of them."""
    case = bench.case
    return default_config(case.rows, case.size, case.out_features, case.pages, BF16)


def triton_call(config: SmlmConfig) -> Callable[..., Any]:
    return lambda x, A, B, plan, out, y: smlm_triton(x, A, B, plan, out, y, config=config)


@jax.jit
def worst_error(got: jax.Array, want: jax.Array) -> jax.Array:
    """Largest difference over the largest magnitude."""
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return jnp.abs(got - want).max() / jnp.abs(want).max()


def bench_case(case: Case) -> list[dict[str, Any]]:
    """Checks, then times, the default configuration, plain XLA and torch."""
    bench, name = Bench(case), f"smlm/{case.name}"
    function, plans = triton_call(default_of(bench)), bench.plans()
    error = float(worst_error(bench.result(function, plans), bench.result(smlm_xla, plans)))
    if not error < 2**-7:
        raise SystemExit(f"{name}: error {error}")
    us = bench.time_us(bench.compile(function, plans), plans)
    peer = dict(zip(("peer", "peer_value"), PEERS.get(case.name, ()), strict=False))
    records = [record(name, "fwd_us", us, "us", bound=case.floor_us, **peer)]
    xla_us = bench.time_us(bench.compile(smlm_xla, plans), plans, repeats=3)
    records.append(record(name, "xla_us", xla_us, "us"))
    torch_us = time_torch(bench)
    if torch_us is not None:
        records.append(record(name, "torch_grouped_mm_us", torch_us, "us"))
    return records


def time_torch(bench: Bench) -> float | None:
    """Two torch._grouped_mm into a fresh delta, in a CUDA graph; None without torch or for stacked targets."""
    try:
        import torch
    except ImportError:
        return None
    case = bench.case
    if not torch.cuda.is_available() or not hasattr(torch, "_grouped_mm") or len(case.out_features) > 1:
        return None
    options = {"device": "cuda", "dtype": torch.bfloat16}
    groups, rank = len(case.runs), case.pages * RANK_PAGE
    x = torch.randn(case.rows, case.size, **options)
    offsets = torch.tensor(np.cumsum(case.runs), dtype=torch.int32, device="cuda")
    calls = min(bench.calls, 32)
    A = torch.randn(calls, groups, rank, case.size, **options)
    B = torch.randn(calls, groups, rank, case.out_features[0], **options)

    def chain() -> None:
        for a, b in zip(A, B, strict=True):
            torch._grouped_mm(torch._grouped_mm(x, a.transpose(-2, -1), offs=offsets), b, offs=offsets)

    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(4):
            graph.replay()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / (4 * calls))
    return sorted(times)[2] * 1e6


def bench_backward() -> list[dict[str, Any]]:
    """dX, dA and dB of the training rows of `mixed` (one pack of 1024 rows), and of four packs."""
    records = []
    for out, rank in ((4096, 16), (4096, 64), (14336, 16), (14336, 64)):
        for packs, case in ((1, "mixed/n11"), (4, "4x1024/n4")):
            us = time_backward(packs, 4096, out, rank)
            name = f"smlm/4096x{out}/r{rank}/{case}"
            records.append(record(name, "bwd_us", us, "us"))
    return records


def time_backward(packs: int, size: int, out: int, rank: int, calls: int = 8) -> float:
    """Microseconds of the backward of `pack_lora` alone, calls chained through dy."""
    pages = math.ceil(rank / RANK_PAGE)
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (packs, 1024, size), BF16)
    A = jax.random.normal(keys[1], (calls, packs, pages, RANK_PAGE, size))
    B = jax.random.normal(keys[2], (calls, packs, pages, RANK_PAGE, out)) * size**-0.5
    dy = jax.random.normal(keys[3], (packs, 1024, out), BF16)

    @jax.jit
    def chain(x: Any, A: Any, B: Any, dy: Any) -> Any:
        grads = []
        for i in range(calls):
            _, transpose = jax.vjp(lambda *a: pack_lora(*a, (out,)), x, A[i], B[i])
            dx, dA, dB = transpose(dy)
            x = dx  # the next call waits for this one
            grads.append((dA, dB))
        return x, grads

    jax.block_until_ready(chain(x, A, B, dy))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(4):
            result = chain(x, A, B, dy)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / (4 * calls))
    return sorted(times)[2] * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--cases", nargs="*", help="case paths; by default the peers' and the 8B groups")
    options = parser.parse_args()
    groups = [f"{g}/r16/{b}" for g in GROUPS for b in ("dec32/n4", "dec32/n32", "mixed/n11")]
    records = []
    for name in options.cases or [*PEERS, *groups]:
        records += bench_case(make_case(name))
        row = {r["metric"]: round(r["value"], 2) for r in records if r["case"] == f"smlm/{name}"}
        print(name, row, "peer", PEERS.get(name), flush=True)
    records += bench_backward()
    print([(r["case"], round(r["value"], 1)) for r in records if r["metric"] == "bwd_us"], flush=True)
    config = {"dtype": "bfloat16", "timing": "chain of calls in one jit, rotated adapters, y donated"}
    print(write("smlm", config, records, options.results))


if __name__ == "__main__":
    main()
