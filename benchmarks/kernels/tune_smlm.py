"""Finds block sizes for the SMLM Triton kernels on the GPU at hand, and checks that they do not change a bit.

    python -m benchmarks.kernels.tune_smlm --seconds 120 --out tune.json

Per case the configurations are compiled in parallel and timed one by one. Prints one line a configuration:
microseconds, whether y after a chain of calls equals the first one's bits. What wins goes into tuning.TUNED by hand.
"""

import argparse
import json
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.kernels.smlm import GROUP_CASES, triton_call
from benchmarks.kernels.smlm_chain import PEERS, Bench, make_case
from pallas_kernels.smlm import TILE, WIDE
from pallas_kernels.smlm.tuning import SmlmConfig


def decode_configs() -> list[SmlmConfig]:
    """Programs of the contraction, block_k, stages and warps of the shrink; block_n and warps of the expand."""
    sizes = [
        (16, 256, 3, 2, 256, 8), (16, 128, 4, 2, 256, 8), (16, 128, 3, 4, 256, 4), (16, 256, 3, 4, 256, 4),
        (4, 256, 3, 2, 256, 8), (16, 256, 3, 2, 128, 4), (16, 256, 3, 2, 512, 8), (16, 256, 3, 2, 64, 1),
    ]  # fmt: skip
    return [make(TILE, False, *size) for size in sizes] + [make(TILE, True, *sizes[0])]


def wide_configs() -> list[SmlmConfig]:
    sizes = [
        (4, 128, 3, 4, 128, 4), (4, 128, 3, 8, 128, 4), (4, 64, 4, 4, 128, 4), (4, 64, 5, 4, 128, 4),
        (4, 128, 3, 4, 64, 4), (4, 128, 3, 4, 256, 8), (8, 128, 2, 4, 128, 4), (2, 64, 3, 4, 128, 4),
    ]  # fmt: skip
    return [make(WIDE, True, *size) for size in sizes] + [make(WIDE, False, *sizes[0])]


def make(
    tile: int, reduce: bool, parts: int, block_k: int, stages: int, warps: int, block_n: int, expand_warps: int
) -> SmlmConfig:
    return SmlmConfig(
        tile, reduce, early=True, programs_k=parts, block_k=block_k, shrink_stages=stages, shrink_warps=warps,
        block_n=block_n, expand_warps=expand_warps,
    )  # fmt: skip


@jax.jit
def same_bits(one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.all(one == other)


class Tuner:
    """Times configurations of one case."""

    def __init__(self, name: str, pool: ThreadPoolExecutor) -> None:
        self.bench, self.pool, self.records = Bench(make_case(name)), pool, []
        self.loops = self.bench.loops(PEERS.get(name, (None, 20.0))[1])
        self.first: jax.Array | None = None

    def run(self, configs: Iterable[SmlmConfig]) -> None:
        """Compiles all, then times one after the other: nothing else runs on the device meanwhile."""
        jobs = [(config, self.pool.submit(self.bench.compile, triton_call(config), self.loops)) for config in configs]
        wait([job for _, job in jobs])
        for config, job in jobs:
            self._time(config, job)

    def _time(self, config: SmlmConfig, job: Future) -> None:
        bench = self.bench
        name = " ".join(f"{field}={value}" for field, value in asdict(config).items())
        try:
            executable = job.result()
        except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
            print("    fail", name, str(error)[:120], flush=True)
            return
        y = bench.dispatch(executable)[0][0]
        self.first = y if self.first is None else self.first
        us, same = bench.time_us(executable, self.loops), bool(same_bits(y, self.first))
        print(f"    {us:8.2f} us  same bits {same}  {name}", flush=True)
        self.records.append({"us": us, "same": same, "config": asdict(config)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="no case is begun after that")
    parser.add_argument("--out", type=Path, default=Path("tune.json"))
    parser.add_argument("--cases", nargs="*", default=[*PEERS, *GROUP_CASES])
    options = parser.parse_args()
    start, found = time.perf_counter(), {}
    print(jax.devices(), flush=True)
    with ThreadPoolExecutor(16) as pool:
        for name in options.cases:
            if time.perf_counter() - start > options.seconds:
                break
            print(f"{name}  [{time.perf_counter() - start:.0f} s]", flush=True)
            tuner = Tuner(name, pool)
            tuner.run(decode_configs() if tuner.bench.case.rows <= 256 else wide_configs())
            found[name] = sorted(tuner.records, key=lambda r: r["us"])
            options.out.write_text(json.dumps(found, indent=1) + "\n")
            del tuner


if __name__ == "__main__":
    main()
