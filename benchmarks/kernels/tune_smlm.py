"""Finds block sizes for the SMLM Triton kernels on the GPU at hand, and checks that they do not change a bit.

    python -m benchmarks.kernels.tune_smlm --seconds 120 --out tune.json

Per case the configurations are compiled in parallel and timed one by one.
Prints one line a configuration: microseconds, error against plain XLA, whether the result equals the first one's bits.
"""

import argparse
import json
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.kernels.smlm import default_of, triton_call, worst_error
from benchmarks.kernels.smlm_chain import Bench, make_case
from pallas_kernels.smlm import TILE
from pallas_kernels.smlm.tuning import SmlmConfig
from pallas_kernels.smlm.xla import smlm_xla

CASES = [
    "4096x4096/r16/dec32/n4",
    "4096x4096/r16/mixed/n11",
    "4096x14336/r16/dec32/n32",
    "4096x14336/r64/mixed/n11",
    "4096x4096/r16/dec32/n32",
    "4096x14336/r16/pre2048/n4",
    "4096x4096/r64/dec32/n32",
    "4096x4096/r64/mixed/n11",
    "4096x14336/r16/mixed/n11",
    "4096x4096/r16/pre2048/n4",
    "4096x14336/r16/dec32/n4",
    "4096x14336/r16/dec256/n32",
    "4096x4096/r16/dec256/n32",
]


def decode_configs() -> list[SmlmConfig]:
    sizes = [
        (8, 256, 4, 3, 256, 4), (4, 128, 4, 4, 256, 4), (8, 128, 2, 4, 256, 4), (8, 128, 1, 5, 256, 4),
        (4, 256, 4, 3, 128, 4), (4, 128, 4, 4, 512, 4), (2, 128, 4, 4, 256, 4),
    ]  # fmt: skip
    return [make(TILE, reduce, *size) for size in sizes for reduce in (False, True)]


def wide_configs() -> list[SmlmConfig]:
    sizes = [
        (64, 4, 128, 4, 3, 128, 4), (64, 4, 64, 4, 4, 128, 4), (64, 2, 64, 4, 3, 128, 4), (64, 8, 128, 4, 3, 128, 4),
        (64, 4, 128, 4, 3, 128, 8), (64, 4, 128, 4, 3, 64, 4), (32, 4, 64, 4, 3, 256, 4), (32, 2, 64, 4, 4, 128, 4),
        (128, 4, 64, 8, 3, 128, 8),
    ]  # fmt: skip
    return [make(tile, True, *size) for tile, *size in sizes]


def make(tile: int, reduce: bool, k: int, block_k: int, w: int, stages: int, n: int, expand_w: int) -> SmlmConfig:
    return SmlmConfig(
        tile_rows=tile, reduce=reduce, programs_k=k, block_k=block_k, shrink_warps=w, shrink_stages=stages,
        block_n=n, expand_warps=expand_w,
    )  # fmt: skip


@jax.jit
def same_bits(one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.all(one == other)


class Tuner:
    """Times configurations of one case."""

    def __init__(self, name: str, pool: ThreadPoolExecutor) -> None:
        self.bench, self.pool, self.records = Bench(make_case(name)), pool, []
        self.want = self.bench.result(smlm_xla, self.bench.plans())
        self.first: jax.Array | None = None

    def run(self, configs: Iterable[SmlmConfig], repeats: int = 10) -> None:
        """Compiles all, then checks and times one after the other: nothing else runs on the device meanwhile."""
        jobs = []
        for config in configs:
            plans = self.bench.plans(max(config.tile_rows, 32))
            jobs.append((config, plans, self.pool.submit(self.bench.compile, triton_call(config), plans)))
        wait([job for *_, job in jobs])
        for config, plans, job in jobs:
            try:
                executable = job.result()
                function = triton_call(config)
                result = self.bench.result(function, plans)
                again = [same_bits(self.bench.result(function, plans), result) for _ in range(repeats)]
                if not all(map(bool, again)):
                    print("    NOT REPEATABLE", self._name(config), flush=True)
                us = self.bench.time_us(executable, plans)
            except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
                print("    fail", self._name(config), str(error)[:120], flush=True)
                continue
            self.first = result if self.first is None else self.first
            error, same = float(worst_error(result, self.want)), bool(same_bits(result, self.first))
            print(f"    {us:8.2f} us  error {error:.4f}  same bits {same}  {self._name(config)}", flush=True)
            self.records.append({"us": us, "error": error, "same": same, "config": asdict(config)})

    @staticmethod
    def _name(config: SmlmConfig) -> str:
        c = config
        shrink = f"tile {c.tile_rows} parts {c.programs_k} k{c.block_k} w{c.shrink_warps} s{c.shrink_stages}"
        return f"{'reduce' if c.reduce else 'split'} {shrink} | n{c.block_n} w{c.expand_warps}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="no case is begun after that")
    parser.add_argument("--out", type=Path, default=Path("tune.json"))
    parser.add_argument("--cases", nargs="*", default=CASES)
    options = parser.parse_args()
    start, found = time.perf_counter(), {}
    print(jax.devices(), jnp.ones(3).sum(), flush=True)
    with ThreadPoolExecutor(16) as pool:
        for name in options.cases:
            if time.perf_counter() - start > options.seconds:
                break
            print(f"{name}  [{time.perf_counter() - start:.0f} s]", flush=True)
            tuner = Tuner(name, pool)
            few = tuner.bench.case.rows <= 256
            tuner.run([default_of(tuner.bench), *(decode_configs() if few else wide_configs())])
            found[name] = sorted(tuner.records, key=lambda r: r["us"])
            options.out.write_text(json.dumps(found, indent=1) + "\n")
            del tuner


if __name__ == "__main__":
    main()
