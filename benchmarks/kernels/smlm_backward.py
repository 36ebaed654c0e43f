"""The backward of packs alone, on one GPU: dX, dA and dB of training packs, against XLA and torch matmuls.

    python -m benchmarks.kernels.smlm_backward      # prints the records; benchmarks.kernels.smlm writes them

S = x A^T is kept by the forward, in the peers' figures too. `bwd_us` is measured as they were: pages and S cold, x and
dY the same arrays in every call; `bwd_cold_us` with x and dY rotated too. Before anything is timed every case's result
is compared with plain XLA's.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.kernels.smlm_chain import GROUPS, POOL_BYTES, READ_WRITE, Chain, Timing, noise, worst_error
from benchmarks.kernels.smlm_torch import graph_us
from benchmarks.results import record
from pallas_kernels.smlm import RANK_PAGE
from pallas_kernels.smlm.pack import pack_backward_xla
from pallas_kernels.smlm.pack_triton import pack_backward_triton

F32 = jnp.float32
ROWS = 1024  # of a pack: the training rows of the peers' `mixed` case
MAX_CALLS = 120
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
        packs: Packs of ROWS rows.
        size: Columns of x.
        outs: Columns of each target.
        rank: Of every pack's adapter.
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
    def ranks(self) -> int:
        """Columns of S: those of all targets."""
        return self.pages * len(self.outs) * RANK_PAGE

    @property
    def weights(self) -> int:
        """Elements of A and B, and of their gradients."""
        return self.packs * self.pages * RANK_PAGE * (len(self.outs) * self.size + sum(self.outs))

    @property
    def row_bytes(self) -> int:
        """x and dY, bf16."""
        return 2 * self.packs * ROWS * (self.size + sum(self.outs))

    @property
    def calls(self) -> int:
        """Calls that have touched POOL_BYTES of pages, float32 gradients and S, or MAX_CALLS."""
        own = 6 * self.weights + 2 * self.packs * ROWS * self.ranks
        return max(2 * self.copies, min(MAX_CALLS, -(-POOL_BYTES // own)))

    @property
    def copies(self) -> int:
        """Arrays x and dY that hold POOL_BYTES."""
        return max(2, -(-POOL_BYTES // self.row_bytes))

    @property
    def floor_us(self) -> float:
        """Bytes of x, dY, dX, the pages and their float32 gradients over the measured bandwidth."""
        return (self.row_bytes + 2 * self.packs * ROWS * self.size + 6 * self.weights) / READ_WRITE * 1e6


def make_cases() -> list[Case]:
    """The peers' projections at both ranks, then the groups of an 8B model; one pack, then four."""
    shapes = {f"4096x{out}/r{rank}": (4096, (out,), rank) for out in (4096, 14336) for rank in (16, 64)}
    shapes |= {f"{group}/r16": (*sizes, 16) for group, sizes in GROUPS.items()}
    batches = {"mixed/n11": 1, "4x1024/n4": 4}
    return [Case(f"{name}/{batch}", n, *shape) for batch, n in batches.items() for name, shape in shapes.items()]


class Bench(Chain):
    """Arrays of one case; every call has A, B, S, dA and dB of its own.

    With `cold`, x and dY rotate too. dX takes the place of the x that it belongs to: nothing is dead code.
    """

    def __init__(self, case: Case, *, cold: bool = False, max_calls: int = MAX_CALLS) -> None:
        self.case, self.calls = case, min(case.calls, max(max_calls, 2 * case.copies))
        copies, packs, out = case.copies if cold else 1, case.packs, sum(case.outs)
        A = noise(2, self.calls, packs, case.pages, len(case.outs) * RANK_PAGE, case.size, scale=case.size**-0.5)
        B = noise(3, self.calls, packs, case.pages, RANK_PAGE, out, scale=out**-0.5)
        S = noise(4, self.calls, packs, ROWS, len(case.outs), case.pages, RANK_PAGE)
        grads = [(jnp.zeros(a.shape, F32), jnp.zeros(b.shape, F32)) for a, b in zip(A, B, strict=True)]
        self.state = (noise(0, copies, packs, ROWS, case.size), grads)
        self.args = (noise(1, copies, packs, ROWS, out), A, B, S)

    def turn(self, function: Callable[..., Any], state: Any, *args: Any) -> Any:
        """Each call waits for the call before; the state is x and the gradients."""
        xs, grads = list(state[0]), list(state[1])
        last = grads[-1]
        for i, mine in enumerate(zip(*args[1:], strict=True)):
            copy = i % len(xs)
            # Without the barrier XLA may run what needs no x of several calls first.
            x, dy, mine, _ = lax.optimization_barrier((xs[copy], args[0][copy], mine, last))
            xs[copy], *grads[i] = last = self.call(function, x, dy, *mine)
        return xs, [tuple(pair) for pair in grads]

    def call(self, function: Callable[..., Any], *arrays: Any) -> tuple[Any, Any, Any]:
        """dX, dA, dB of (x, dY, A, B, S): pages cast to float32, as training does, so that gradients are float32."""
        x, dy, A, B, S = arrays
        return function(x, A.astype(F32), B.astype(F32), S, dy, self.case.outs)

    def check(self) -> None:
        """Ends the program where the kernels and plain XLA disagree."""
        first = (self.state[0][0], *(arrays[0] for arrays in self.args))
        functions = (pack_backward_triton, pack_backward_xla)
        found = [jax.jit(partial(self.call, function))(*first) for function in functions]
        for name, got, want in zip(("dX", "dA", "dB"), *found, strict=True):
            error = float(worst_error(got, want))
            if not error < 2**-7:
                raise SystemExit(f"{self.case.name}: {name} has error {error}, expected less than {2**-7}")


def time_torch(case: Case, *, cold: bool) -> float | None:
    """dS = dY B^T, dX = dS A, dA = dS^T X, dB = S^T dY in bfloat16 and a CUDA graph; None without torch and a GPU.

    Args:
        case: With one target: several would need a matmul each.
        cold: x and dY rotate.
    """
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available() or len(case.outs) > 1:
        return None
    packs, copies, options = case.packs, case.copies if cold else 1, {"device": "cuda", "dtype": torch.bfloat16}

    def some(count: int, *shape: int) -> list[Any]:
        return [torch.randn(packs, *shape, **options).squeeze(0) for _ in range(count)]

    xs, dys = some(copies, ROWS, case.size), some(copies, ROWS, case.outs[0])
    dxs = [torch.empty_like(x) for x in xs]
    As, Bs = some(case.calls, case.ranks, case.size), some(case.calls, case.ranks, case.outs[0])
    Ss = some(case.calls, ROWS, case.ranks)

    def chain() -> None:
        for i, (A, B, S) in enumerate(zip(As, Bs, Ss, strict=True)):
            x, dy, dx = xs[i % copies], dys[i % copies], dxs[i % copies]
            ds = dy @ B.mT
            torch.matmul(ds, A, out=dx)
            torch.matmul(ds.mT, x)
            torch.matmul(S.mT, dy)

    return graph_us(chain, case.calls)


def timings(case: Case, *, ours: bool) -> list[Timing]:
    """Checks a case and compiles all of it that jax runs."""
    extra: dict[str, Any] = {"bound": case.floor_us}
    peer = {"peer": "torch matmuls", "peer_value": PEERS[case.name]} if case.name in PEERS else {}
    found: list[Timing] = []
    for cold, us in ((False, "us"), (True, "cold_us")):
        guess, more = 1.5 * case.floor_us + 5, extra if cold else extra | peer
        found.append(Timing(case.name, f"bwd_{us}", Bench(case, cold=cold), pack_backward_triton, guess, more))
        if ours:
            continue
        few = Bench(case, cold=cold, max_calls=32)  # XLA's compile slowly
        found.append(Timing(case.name, f"bwd_xla_{us}", few, pack_backward_xla, 2 * guess, repeats=3))
    found[0].bench.check()
    for timing in found:
        timing.compile()
    return found


def backward_records(cases: list[Case] | None = None, *, ours: bool = False) -> list[dict[str, Any]]:
    """Checks and compiles all cases side by side, then times them one after the other.

    Args:
        cases: By default all.
        ours: Time the kernels alone, and neither XLA nor torch.

    Returns:
        Records for smlm.json; prints a line a case.
    """
    records: list[dict[str, Any]] = []
    cases = make_cases() if cases is None else cases
    with ThreadPoolExecutor(16) as pool:
        todo = list(pool.map(partial(timings, ours=ours), cases))
    for case, some in zip(cases, todo, strict=True):
        new = [timing.record() for timing in some]
        for cold, metric in ((False, "bwd_torch_us"), (True, "bwd_torch_cold_us")):
            us = None if ours else time_torch(case, cold=cold)
            new += [] if us is None else [record(f"smlm/{case.name}", metric, us, "us")]
        print(case.name, [(r["metric"], round(r["value"], 1)) for r in new], f"floor {case.floor_us:.1f}", flush=True)
        records += new
    return records


if __name__ == "__main__":
    backward_records()
