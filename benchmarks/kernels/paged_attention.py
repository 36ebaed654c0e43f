"""Attention alone, on one GPU, in the shapes of an 8B model: paged decode and prefill, packs forward and backward.

    python -m benchmarks.kernels.paged_attention           # writes benchmarks/results/<device>/paged_attention.json
    python -m benchmarks.kernels.paged_attention --tune    # tries cuts of the decode and prefill kernels

Every case is compared with plain XLA in float32 before it is timed.
"""

import argparse
import functools
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.results import record, write
from pallas_kernels import AttentionPlan, pack_attention
from pallas_kernels.paged_attention import paged_attention_ref
from pallas_kernels.paged_attention.triton import AttentionConfig, attention_config, paged_attention_triton
from pallas_kernels.paged_attention.xla import paged_attention_xla

BANDWIDTH = 4.33e12  # bytes/s a sum-reduce reads on an H200, as measured
BF16 = jnp.bfloat16
LAYERS = 6  # caches a chain of calls rotates through: none finds its keys in L2
CALLS = 12


@dataclass(frozen=True)
class Case:
    """`sequences` of `context` keys; each computes its last `rows` rows.

    Attributes:
        peer_us: The throwaway prototype's time on an H200, which this kernel must not exceed.
    """

    name: str
    sequences: int
    context: int
    rows: int = 1
    columns: int = 0
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    window: int | None = None
    peer_us: float | None = None

    @property
    def block_rows(self) -> int:
        return 1 if self.rows == 1 else 16

    @property
    def floor_us(self) -> float:
        """Bytes of the keys and values that are seen, once, over the bandwidth."""
        keys = self.context if self.window is None else min(self.context, self.window + self.rows - 1)
        return 4 * self.sequences * keys * self.kv_heads * self.head_dim / BANDWIDTH * 1e6


CASES = (
    Case("decode/B32/ctx580", 32, 580, peer_us=28.5),
    Case("decode/B32/ctx580/table2048", 32, 580, columns=128),
    Case("decode/B128/ctx580", 128, 580, peer_us=84.8),
    Case("decode/B8/ctx16384", 8, 16384, peer_us=282.0),
    Case("decode/B32/ctx4096/window1024", 32, 4096, window=1024),
    Case("prefill/1x512", 1, 512, rows=512),
    Case("prefill/4x128/ctx512", 4, 512, rows=128),
)
CHECKED = (
    Case("head64", 5, 200, heads=14, kv_heads=2, head_dim=64, page_size=32),
    Case("head96", 3, 100, rows=40, heads=8, kv_heads=8, head_dim=96),
    Case("head256", 3, 100, rows=40, heads=8, kv_heads=1, head_dim=256, window=31),
    Case("head256 decode", 3, 2100, heads=8, kv_heads=1, head_dim=256),
)


class Bench:
    """Arrays of one case."""

    def __init__(self, case: Case, dtype: Any = BF16, layers: int = LAYERS) -> None:
        self.case = case
        held = -(-case.context // case.page_size)
        columns = case.columns or held
        pages = 1 + case.sequences * held
        tables = np.zeros((case.sequences, columns), np.int32)
        tables[:, :held] = 1 + np.random.default_rng(0).permutation(pages - 1).reshape(-1, held)
        first = range(case.context - case.rows, case.context, case.block_rows)
        blocks = [(s, p, min(case.block_rows, case.context - p)) for s in range(case.sequences) for p in first]
        seq, pos, length = (jnp.asarray(column, jnp.int32) for column in zip(*blocks, strict=True))
        self.plan = AttentionPlan(seq, pos, length, jnp.asarray(tables))
        keys = jax.random.split(jax.random.key(0), 2 * layers + 1)
        shape = (pages, case.page_size, case.kv_heads, case.head_dim)
        self.caches = [
            tuple(jax.random.normal(k, shape, dtype) for k in keys[2 * i : 2 * i + 2]) for i in range(layers)
        ]
        self.q = jax.random.normal(keys[-1], (len(blocks) * case.block_rows, case.heads, case.head_dim), dtype)

    def run(self, function: Callable[..., jax.Array], calls: int = CALLS) -> Callable[..., jax.Array]:
        """A chain of calls, each with the result of the one before as its queries."""
        case = self.case

        @jax.jit
        def chain(q: jax.Array, caches: Any, plan: AttentionPlan) -> jax.Array:
            for i in range(calls):
                k_pages, v_pages = caches[i % len(caches)]
                q = function(
                    q, k_pages, v_pages, plan, block_rows=case.block_rows, scale=case.head_dim**-0.5, window=case.window
                )
            return q

        return lambda: chain(self.q, self.caches, self.plan)


def time_us(function: Callable[[], Any], calls: int, repeats: int = 20) -> float:
    """Median of five: microseconds of one of `calls` calls, by wall clock over back-to-back runs."""
    jax.block_until_ready(function())
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeats):
            out = function()
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / repeats / calls * 1e6)
    return sorted(times)[2]


def worst_error(got: jax.Array, want: jax.Array) -> float:
    """Largest difference over the largest magnitude."""
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    return float(np.abs(got - want).max() / np.abs(want).max())


def check(case: Case, dtype: Any) -> None:
    bench = Bench(case, dtype, layers=1)
    reference = paged_attention_ref if case.context * bench.q.shape[0] < 60000 else paged_attention_xla
    error = worst_error(bench.run(paged_attention_triton, 1)(), bench.run(reference, 1)())
    print(f"{case.name} {jnp.dtype(dtype).name}: error {error:.1e}", flush=True)
    if not error < (1e-2 if dtype == BF16 else 1e-4):
        raise SystemExit(f"{case.name}: error {error}")


def check_batch_does_not_matter() -> None:
    """A decode row's bits are the same alone and in a crowd."""
    bench = Bench(CASES[0], layers=1)
    q, plan, (k_pages, v_pages) = bench.q, bench.plan, bench.caches[0]
    run = jax.jit(functools.partial(paged_attention_triton, block_rows=1, scale=0.1))
    alone = replace(plan, block_seq=plan.block_seq[7:8], block_pos=plan.block_pos[7:8], block_len=plan.block_len[7:8])
    np.testing.assert_array_equal(run(q[7:8], k_pages, v_pages, alone)[0], run(q, k_pages, v_pages, plan)[7])


def bench_case(case: Case) -> list[dict[str, Any]]:
    check(case, BF16)
    us = time_us(Bench(case).run(paged_attention_triton), CALLS)
    print(f"{case.name}: {us:.1f} us, floor {case.floor_us:.1f}, bar {case.peer_us}", flush=True)
    peer = {} if case.peer_us is None else {"peer": "prototype", "peer_value": case.peer_us}
    return [record(f"paged_attention/{case.name}", "us", us, "us", bound=case.floor_us, **peer)]


def bench_packs(packs: int, length: int) -> list[dict[str, Any]]:
    """Packs of two samples, cuDNN against XLA, then cuDNN's time."""
    keys = jax.random.split(jax.random.key(1), 4)
    q, ct = (jax.random.normal(k, (packs, length, 32, 128), BF16) for k in keys[:2])
    k, v = (jax.random.normal(key, (packs, length, 8, 128), BF16) for key in keys[2:])
    cut = length // 3
    positions = jnp.tile(jnp.concatenate([jnp.arange(cut), jnp.arange(length - cut)]), (packs, 1))
    segments = jnp.tile(jnp.where(jnp.arange(length) < cut, 0, 1), (packs, 1))

    def forward(implementation: str, q: Any, k: Any, v: Any) -> jax.Array:
        return pack_attention(q, k, v, positions, segments, scale=128**-0.5, implementation=implementation)

    @functools.partial(jax.jit, static_argnums=0)
    def both(implementation: str, q: Any, k: Any, v: Any, ct: Any) -> Any:
        out, transpose = jax.vjp(functools.partial(forward, implementation), q, k, v)
        return out, *transpose(ct)

    got, want = both("cudnn", q, k, v, ct), both("xla", q, k, v, ct)
    errors = [worst_error(a, b) for a, b in zip(got, want, strict=True)]
    print(f"packs {packs}x{length}: errors", " ".join(f"{e:.1e}" for e in errors), flush=True)
    if not max(errors) < 2e-2:
        raise SystemExit(f"packs {packs}x{length}: errors {errors}")
    only = jax.jit(functools.partial(forward, "cudnn"))
    fwd = time_us(lambda: only(q, k, v), 1)
    total = time_us(lambda: both("cudnn", q, k, v, ct), 1)
    print(f"packs {packs}x{length}: forward {fwd:.0f} us, with backward {total:.0f} us", flush=True)
    case = f"pack_attention/{packs}x{length}"
    return [record(case, "fwd_us", fwd, "us"), record(case, "fwd_bwd_us", total, "us")]


def tune() -> None:
    """Times every cut that compiles and prints the best five of each case."""
    for name in ("decode/B32/ctx580", "decode/B128/ctx580", "decode/B8/ctx16384", "prefill/1x512"):
        case = next(c for c in CASES if c.name == name)
        bench, found = Bench(case), []
        several = (1, 2, 4) if case.rows == 1 else (1,)
        parts = several if case.context < 4096 else (8, 16)
        for keys, warps, stages, split in itertools.product((32, 64, 128), (2, 4, 8), (2, 3), parts):
            config = AttentionConfig(keys=keys, warps=warps, stages=stages, parts=split)
            if config.warps == 8 and split > 1 and case.context < 4096:
                continue
            try:
                us = time_us(bench.run(functools.partial(paged_attention_triton, config=config), LAYERS), LAYERS, 10)
            except jax.errors.JaxRuntimeError:
                continue  # more shared memory than there is
            found.append((us, config))
        found.sort(key=lambda f: f[0])
        default = attention_config(case.block_rows, case.heads // case.kv_heads, case.head_dim, case.context)
        print(name, "default", default)
        for us, config in found[:5]:
            print(f"  {us:.1f} us {config}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--results", type=Path, default=None, help="folder, instead of benchmarks/results")
    args = parser.parse_args()
    if args.tune:
        tune()
        return
    for case, dtype in itertools.product(CHECKED, (BF16, jnp.float32)):
        check(case, dtype)
    check_batch_does_not_matter()
    records = [r for case in CASES for r in bench_case(case)]
    for packs, length in ((1, 1024), (4, 1024), (1, 8192)):
        records += bench_packs(packs, length)
    print(write("paged_attention", {"dtype": "bfloat16", "layers": LAYERS, "calls": CALLS}, records, args.results))


if __name__ == "__main__":
    main()
