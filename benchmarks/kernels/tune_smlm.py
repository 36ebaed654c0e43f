"""Finds block sizes for the SMLM Triton kernels on the GPU at hand, and checks that they do not change a bit.

    python -m benchmarks.kernels.tune_smlm --seconds 120 --out tune.json

Per case: the shrink's sizes first, then the expand's under the best of them; compiled in parallel, timed one by one.
Prints one line a configuration: microseconds, error against plain XLA, whether the result equals the first one's bits.
"""

import argparse
import json
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels.smlm import default_of, triton_call, worst_error
from benchmarks.kernels.smlm_chain import BF16, Bench, make_case
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


def decode_shrinks() -> list[SmlmConfig]:
    two = [
        (256, 4, 3, 8), (128, 4, 4, 8), (512, 4, 2, 8), (512, 2, 2, 8), (128, 2, 4, 8), (128, 1, 5, 8), (128, 4, 4, 4),
    ]  # fmt: skip
    one = [(64, 256, 4, 3), (32, 512, 4, 4), (64, 128, 4, 3), (64, 512, 8, 3), (32, 1024, 8, 4), (128, 256, 8, 2)]
    return [
        SmlmConfig(block_k=k, shrink_warps=w, shrink_stages=s, programs_k=p, block_n=256) for k, w, s, p in two
    ] + [SmlmConfig(fused=True, block_k=k, block_n=n, shrink_warps=w, shrink_stages=s) for k, n, w, s in one]


def wide_shrinks() -> list[SmlmConfig]:
    two = [
        (32, 1, 32, 4, 4), (32, 2, 64, 4, 3), (32, 4, 128, 4, 3), (64, 2, 64, 4, 3), (64, 4, 64, 4, 4),
        (64, 4, 128, 4, 3), (64, 8, 128, 4, 3), (128, 4, 64, 8, 3), (128, 8, 64, 4, 3), (16, 8, 256, 4, 3),
    ]  # fmt: skip
    one = [(16, 32, 1024, 8, 4), (64, 32, 256, 8, 3), (32, 32, 512, 8, 3)]
    return [
        SmlmConfig(tile_rows=t, programs_k=p, block_k=k, shrink_warps=w, shrink_stages=s, block_n=256, expand_warps=8)
        for t, p, k, w, s in two
    ] + [
        SmlmConfig(tile_rows=t, fused=True, block_k=k, block_n=n, shrink_warps=w, shrink_stages=s)
        for t, k, n, w, s in one
    ]  # fmt: skip


def expands(best: SmlmConfig) -> list[SmlmConfig]:
    if best.tile_rows == TILE:
        sizes = [(128, 2), (128, 4), (256, 2), (256, 4), (512, 4), (512, 8), (1024, 8)]
    else:
        sizes = [(64, 4), (128, 4), (128, 8), (256, 4), (512, 8)]
    return [replace(best, block_n=n, expand_warps=w) for n, w in sizes]


class Tuner:
    """Times configurations of one case."""

    def __init__(self, name: str, pool: ThreadPoolExecutor) -> None:
        self.bench, self.pool, self.records = Bench(make_case(name)), pool, []
        self.want = self.bench.result(smlm_xla, self.bench.plans())
        self.first: np.ndarray | None = None

    def run(self, configs: Iterable[SmlmConfig]) -> None:
        jobs = []
        for config in configs:
            plans = self.bench.plans(max(config.tile_rows, 32))
            jobs.append((config, plans, self.pool.submit(self._compile, config, plans)))
        for config, plans, job in jobs:
            try:
                executable, result = job.result()
                us = self.bench.time_us(executable, plans)
            except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
                print("    fail", self._name(config), str(error)[:120], flush=True)
                continue
            self.first = result if self.first is None else self.first
            error, same = worst_error(result, self.want), bool(np.array_equal(result, self.first))
            print(f"    {us:8.2f} us  error {error:.4f}  same bits {same}  {self._name(config)}", flush=True)
            self.records.append({"us": us, "error": error, "same": same, "config": asdict(config)})

    def _compile(self, config: SmlmConfig, plans: Any) -> tuple[Any, np.ndarray]:
        function = triton_call(config)
        return self.bench.compile(function, plans), self.bench.result(function, plans)

    @staticmethod
    def _name(config: SmlmConfig) -> str:
        c = config
        shrink = f"tile {c.tile_rows} parts {c.programs_k} k{c.block_k} w{c.shrink_warps} s{c.shrink_stages}"
        return f"fused n{c.block_n} {shrink}" if c.fused else f"{shrink} | n{c.block_n} w{c.expand_warps}"

    def best(self, *, fused: bool) -> SmlmConfig | None:
        timed = [r for r in self.records if r["config"]["fused"] == fused and r["error"] < 2**-7]
        return SmlmConfig(**min(timed, key=lambda r: r["us"])["config"]) if timed else None


def beside_gemm(config: SmlmConfig, options: dict[str, Any], rows: int = 32) -> tuple[float, float]:
    """Microseconds of a 4096x4096 base GEMM, and of the same with SMLM on top, x of one being y of the last."""
    bench = Bench(make_case("4096x4096/r16/dec32/n4"))
    weights = [jax.random.normal(jax.random.key(i), (4096, 4096), BF16) * BF16(1 / 64) for i in range(8)]

    def chain(with_lora: bool) -> Any:
        def f(x: Any, A: Any, B: Any, weights: list[Any], plans: Any) -> Any:
            for i, (tile_pages, wide_pages) in enumerate(plans[1]):
                plan = plans[0][0]._replace(tile_pages=tile_pages, wide_pages=wide_pages)
                y = (x @ weights[i % 8]).astype(BF16)
                if with_lora:
                    y = triton_call(config)(x, A, B, plan, (4096,), y)
                x = y * BF16(0.5)
            return x

        args = (bench.x, bench.A, bench.B, weights, bench.plans())
        executable = jax.jit(f).lower(*args).compile(compiler_options=options)
        executable(*args).block_until_ready()
        times = []
        for _ in range(7):
            start = time.perf_counter()
            for _ in range(4):
                out = executable(*args)
            out.block_until_ready()
            times.append((time.perf_counter() - start) / (4 * bench.calls))
        return sorted(times)[3] * 1e6

    return chain(False), chain(True)


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
            decode = tuner.bench.case.rows <= 256
            tuner.run([default_of(tuner.bench), *(decode_shrinks() if decode else wide_shrinks())])
            best = tuner.best(fused=False)
            if best is not None:
                tuner.run(expands(best))
            found[name] = sorted(tuner.records, key=lambda r: r["us"])
            options.out.write_text(json.dumps(found, indent=1) + "\n")
            if name == options.cases[0]:
                flags = ({}, {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"})
                for config in (tuner.best(fused=False), tuner.best(fused=True)):
                    for flag in flags:
                        try:
                            print("    beside a GEMM", flag, tuner._name(config), beside_gemm(config, flag), flush=True)
                        except (jax.errors.JaxRuntimeError, ValueError) as error:
                            print("    beside a GEMM", flag, str(error)[:200], flush=True)
            del tuner


if __name__ == "__main__":
    main()
