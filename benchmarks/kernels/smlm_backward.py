"""The backward of `pack_lora` alone, on one GPU: dX, dA and dB of training packs, against XLA and torch matmuls.

    python -m benchmarks.kernels.smlm_backward      # prints the records; benchmarks.kernels.smlm writes them

A chain of calls in one jit: call i has x and dY of copy i, and its dX takes the place of that copy's x; copies exceed
the L2 several times, so x and dY are cold. `bwd_us` has S = x A^T from the forward, as the peers' figures do;
`bwd_replay_us` is what a training step runs: S is computed again.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.kernels.smlm_chain import BF16, GROUPS, READ_WRITE
from benchmarks.results import record
from pallas_kernels.smlm import RANK_PAGE, pack_lora
from pallas_kernels.smlm.pack import pack_backward_xla
from pallas_kernels.smlm.pack_triton import pack_backward

ROWS = 1024  # of a pack: the training rows of the peers' `mixed` case
POOL_BYTES = 600e6  # of all copies of x and dY
# Microseconds of torch matmuls on an H200, S kept by the forward (the reference measurements).
PEERS = {
    "4096x4096/r16/mixed/n11": 41.0,
    "4096x4096/r64/mixed/n11": 43.0,
    "4096x14336/r16/mixed/n11": 53.0,
    "4096x14336/r64/mixed/n11": 55.0,
}


@dataclass(frozen=True)
class Case:
    """The backward of one projection group.

    Attributes:
        name: A path as in `smlm_chain`; `mixed/n11` has one pack, `4x1024/n4` four.
    """

    name: str
    packs: int
    size: int
    outs: tuple[int, ...]
    rank: int

    @property
    def pages(self) -> int:
        return math.ceil(self.rank / RANK_PAGE)

    @property
    def copies(self) -> int:
        return max(3, min(24, math.ceil(POOL_BYTES / (2 * self.packs * ROWS * (self.size + sum(self.outs))))))

    @property
    def floor_us(self) -> float:
        """Bytes of x, dY, dX, the pages and their float32 gradients over the measured bandwidth."""
        out = sum(self.outs)
        pages = self.packs * self.pages * RANK_PAGE * (len(self.outs) * self.size + out)
        return (2 * self.packs * ROWS * (2 * self.size + out) + 6 * pages) / READ_WRITE * 1e6


def make_cases() -> list[Case]:
    """The peers' projections at both ranks, then the groups of an 8B model; one pack, then four."""
    shapes = {f"4096x{out}/r{rank}": (4096, (out,), rank) for out in (4096, 14336) for rank in (16, 64)}
    shapes |= {f"{group}/r16": (*sizes, 16) for group, sizes in GROUPS.items()}
    batches = {"mixed/n11": 1, "4x1024/n4": 4}
    return [Case(f"{name}/{batch}", n, *shape) for name, shape in shapes.items() for batch, n in batches.items()]


def time_us(run: Callable[[], Any], wait: Callable[[Any], Any], calls: int) -> float:
    """Median of seven: microseconds of one of `calls` calls, by wall clock over back-to-back runs."""
    wait(run())
    times = []
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(3):
            result = run()
        wait(result)
        times.append((time.perf_counter() - start) / (3 * calls))
    return statistics.median(times) * 1e6


def time_jax(case: Case, implementation: str, *, keep: bool) -> float:
    """Microseconds of dX, dA and dB.

    Args:
        case: The shapes.
        implementation: "triton" or "xla".
        keep: S is given; otherwise it is the transpose of `pack_lora`, whose forward is dead code but for S.
    """
    keys = iter(jax.random.split(jax.random.key(0), 2 * case.copies + 3))

    def noise(*shape: int, scale: float = 1.0) -> jax.Array:
        return jax.random.normal(next(keys), (case.packs, *shape), BF16) * BF16(scale)

    xs = [noise(ROWS, case.size) for _ in range(case.copies)]
    dys = [noise(ROWS, sum(case.outs)) for _ in range(case.copies)]
    ranks = len(case.outs) * RANK_PAGE
    A = noise(case.pages, ranks, case.size, scale=case.size**-0.5)
    B = noise(case.pages, RANK_PAGE, sum(case.outs), scale=sum(case.outs) ** -0.5)
    S = noise(ROWS, case.pages, ranks)
    calls, backward = 2 * case.copies, pack_backward if implementation == "triton" else pack_backward_xla

    @jax.jit
    def chain(xs: list[Any], dys: list[Any], A: Any, B: Any, S: Any) -> Any:
        grads, xs, pages = [], list(xs), (A.astype(jnp.float32), B.astype(jnp.float32))
        last: Any = ()
        for i in range(calls):
            copy = i % case.copies
            # The barrier keeps the calls apart: otherwise the scheduler runs the first launches of several.
            x, dy, _ = lax.optimization_barrier((xs[copy], dys[copy], last))
            if keep:
                last = backward(x, *pages, S, dy, case.outs)
            else:
                lora = partial(pack_lora, out_features=case.outs, implementation=implementation)
                last = jax.vjp(lora, x, *pages)[1](dy)
            xs[copy] = last[0]
            grads.append(last[1:])
        return xs, grads

    return time_us(lambda: chain(xs, dys, A, B, S), jax.block_until_ready, calls)


def time_torch(case: Case, *, keep: bool) -> float | None:
    """dS = dY B^T, dX = dS A, dA = dS^T X, dB = S^T dY in bfloat16 and a CUDA graph; None without torch and a GPU.

    Args:
        case: With one target: several would need a matmul each.
        keep: S is given; otherwise it is computed too.
    """
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available() or len(case.outs) > 1:
        return None
    packs, rank, options = case.packs, case.pages * RANK_PAGE, {"device": "cuda", "dtype": torch.bfloat16}

    def noise(*shape: int) -> list[Any]:
        return [torch.randn(packs, *shape, **options).squeeze(0) for _ in range(case.copies)]

    xs, dys = noise(ROWS, case.size), noise(ROWS, case.outs[0])
    (A, *_), (B, *_), (S, *_) = noise(rank, case.size), noise(rank, case.outs[0]), noise(ROWS, rank)
    dxs = [torch.empty_like(x) for x in xs]

    def chain() -> None:
        for x, dy, dx in zip(xs, dys, dxs, strict=True):
            s = S if keep else x @ A.mT
            ds = dy @ B.mT
            torch.matmul(ds, A, out=dx)
            torch.matmul(ds.mT, x)
            torch.matmul(s.mT, dy)

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    return time_us(graph.replay, lambda _: torch.cuda.synchronize(), case.copies)


def bench_case(case: Case) -> list[dict[str, Any]]:
    """The kernels, plain XLA and torch, with S kept by the forward and computed again."""
    extra: dict[str, Any] = {"bound": case.floor_us}
    if case.name in PEERS:
        extra |= {"peer": "torch matmuls", "peer_value": PEERS[case.name]}
    records = []
    for keep, suffix in ((True, "us"), (False, "replay_us")):
        found = {
            f"bwd_{suffix}": time_jax(case, "triton", keep=keep),
            f"bwd_xla_{suffix}": time_jax(case, "xla", keep=keep),
            f"bwd_torch_{suffix}": time_torch(case, keep=keep),
        }
        for metric, us in found.items():
            if us is not None:
                more = extra if metric == "bwd_us" else {}
                records.append(record(f"smlm/{case.name}", metric, us, "us", **more))
    return records


def backward_records() -> list[dict[str, Any]]:
    """Records of all cases, for smlm.json; prints a line a case."""
    records = []
    for case in make_cases():
        found = bench_case(case)
        print(case.name, {r["metric"]: round(r["value"], 1) for r in found}, f"floor {case.floor_us:.1f}", flush=True)
        records += found
    return records


if __name__ == "__main__":
    backward_records()
