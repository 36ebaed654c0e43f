"""Cases of the SMLM benchmarks, and the device time of a call: chains of calls over rotated adapters.

Every call of a chain reads its own adapter pages, picked from a pool larger than the L2 cache, and adds into one y,
so calls neither overlap nor find their weights cached.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.smlm import RANK_PAGE, TILE, WIDE, SmlmPlan, build_plan

BF16 = jnp.bfloat16
POOL_BYTES = 1 << 27  # more than twice the L2 of an H200: what one pass over the pages touches
READ_WRITE = 3.2e12  # bytes/s of a copy on an H200, as measured

# Best peer's graph time in microseconds on an H200 (SGLang triton_v2, vLLM Triton or torch _grouped_mm).
PEERS = {
    "4096x4096/r16/dec32/n4": ("vLLM Triton", 8.8),
    "4096x4096/r16/dec32/n32": ("SGLang triton_v2", 13.5),
    "4096x4096/r16/dec256/n32": ("SGLang triton_v2", 14.2),
    "4096x4096/r16/pre2048/n4": ("SGLang triton_v2", 26.9),
    "4096x4096/r16/mixed/n11": ("SGLang triton_v2", 25.1),
    "4096x4096/r64/dec32/n32": ("SGLang triton_v2", 19.1),
    "4096x4096/r64/mixed/n11": ("SGLang triton_v2", 37.1),
    "4096x14336/r16/dec32/n4": ("SGLang triton_v2", 10.2),
    "4096x14336/r16/dec32/n32": ("SGLang triton_v2", 19.0),
    "4096x14336/r16/dec256/n32": ("SGLang triton_v2", 20.8),
    "4096x14336/r16/pre2048/n4": ("torch _grouped_mm", 52.0),
    "4096x14336/r16/mixed/n11": ("SGLang triton_v2", 46.4),
    "4096x14336/r64/mixed/n11": ("SGLang triton_v2", 69.0),
}
BATCHES = {
    "dec32": lambda n: [32 // n] * n,
    "dec256": lambda n: [256 // n] * n,
    "pre2048": lambda n: [2048 // n] * n,
    "mixed": lambda n: [1024, 256, 256] + [4] * (n - 3),
}
# Projection groups of an 8B model, which no peer was measured on: one launch pair for stacked targets.
GROUPS = {"qkv": (4096, (4096, 1024, 1024)), "gate_up": (4096, (14336, 14336)), "down": (14336, (4096,))}


Plans = tuple[list[SmlmPlan], list[tuple[Any, Any]]]


@dataclass(frozen=True)
class Case:
    """One shape, rank and batch; rows of adapter i are the i-th run."""

    name: str
    size: int
    out_features: tuple[int, ...]
    rank: int
    runs: tuple[int, ...]

    @property
    def rows(self) -> int:
        return sum(self.runs)

    @property
    def pages(self) -> int:
        return math.ceil(self.rank / RANK_PAGE)

    @property
    def adapter_bytes(self) -> int:
        """A and B of all adapters of the case, bf16."""
        ranks = len(self.runs) * self.pages * RANK_PAGE
        return 2 * ranks * (self.size * len(self.out_features) + sum(self.out_features))

    @property
    def floor_us(self) -> float:
        """Bytes of x, y in and out, A and B over the measured bandwidth."""
        data = 2 * self.rows * (self.size + 2 * sum(self.out_features)) + self.adapter_bytes
        return data / READ_WRITE * 1e6


def make_case(name: str) -> Case:
    """A case from its path: `4096x4096/r16/dec32/n4` or `gate_up/r16/dec32/n4`."""
    shape, rank, batch, adapters = name.split("/")
    size, out = GROUPS[shape] if shape in GROUPS else (int(shape.split("x")[0]), (int(shape.split("x")[1]),))
    runs = BATCHES[batch](int(adapters[1:]))
    return Case(name, size, out, int(rank[1:]), tuple(runs))


def noise(stream: int, *shape: int, scale: float = 1.0) -> jax.Array:
    """Normal bfloat16 numbers; one pool serves all shapes, each stream from a place of its own."""
    start = 12345 * stream
    return (_pool()[start : start + math.prod(shape)] * BF16(scale)).reshape(shape)


@cache
def _pool() -> jax.Array:
    return jax.random.normal(jax.random.key(0), ((1 << 29) + (1 << 16),), BF16)


class Bench:
    """Arrays and plans of one case: `calls` calls, each with pages (and, for many rows, rows) of its own."""

    def __init__(self, case: Case) -> None:
        self.case = case
        few = case.rows <= 256
        self.copies = 1 if few else 4  # of x and y, so that many rows leave the cache too
        self.calls = max(32, min(128, POOL_BYTES // case.adapter_bytes)) if few else 16
        self.num_pages = 1 + self.calls * len(case.runs) * case.pages
        out, targets = sum(case.out_features), len(case.out_features)
        rows = self.copies * case.rows
        self.x = noise(0, rows, case.size)
        self.A = noise(1, self.num_pages, targets * RANK_PAGE, case.size)
        self.B = noise(2, self.num_pages, RANK_PAGE, out, scale=case.size**-0.5)
        self.y = noise(3, rows, out)
        pages = 1 + np.random.default_rng(0).permutation(self.num_pages - 1)
        self._pages = pages.reshape(self.calls, len(case.runs), case.pages)
        self._plans: dict[int, Plans] = {}
        self._single: dict[Callable[..., Any], Any] = {}

    def plans(self, wide: int = WIDE) -> "Plans":
        """(plan of each copy, (tile_pages, wide_pages) of each call), with wide tiles of that many rows."""
        if wide not in self._plans:
            built = [self._plan(call, wide) for call in range(self.calls)]
            to_device = partial(jax.tree.map, jnp.asarray)
            pages = [(plan.tile_pages, plan.wide_pages) for plan in built]
            self._plans[wide] = (to_device(built[: self.copies]), to_device(pages))
        return self._plans[wide]

    def _plan(self, call: int, wide: int) -> SmlmPlan:
        case, first, segments = self.case, (call % self.copies) * self.case.rows, []
        for rows, pages in zip(case.runs, self._pages[call], strict=True):
            segments.append((first, rows, tuple(pages.tolist())))
            first += rows
        tiles = sum(-(-rows // TILE) for rows in case.runs)
        return build_plan(segments, self.copies * case.rows, tiles, case.pages, wide=wide)

    def compile(self, function: Callable[..., Any], plans: "Plans") -> Any:
        """The whole chain as one executable, y donated."""

        def chain(x: Any, A: Any, B: Any, y: Any, plans: Plans) -> Any:
            for call, (tile_pages, wide_pages) in enumerate(plans[1]):
                plan = plans[0][call % self.copies]._replace(tile_pages=tile_pages, wide_pages=wide_pages)
                y = function(x, A, B, plan, self.case.out_features, y)
            return y

        return jax.jit(chain, donate_argnums=3).lower(self.x, self.A, self.B, self.y, plans).compile()

    def time_us(self, executable: Any, plans: "Plans", *, repeats: int = 7) -> float:
        """Median microseconds of one call."""
        y = executable(self.x, self.A, self.B, self.y.copy(), plans)
        y = executable(self.x, self.A, self.B, y, plans).block_until_ready()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            for _ in range(4):
                y = executable(self.x, self.A, self.B, y, plans)
            y.block_until_ready()
            times.append((time.perf_counter() - start) / (4 * self.calls))
        return sorted(times)[repeats // 2] * 1e6

    def result(self, function: Callable[..., Any], plans: "Plans") -> jax.Array:
        """y of the first call, to compare implementations."""
        plan = plans[0][0]
        if function not in self._single:
            self._single[function] = jax.jit(lambda *a: function(*a[:4], self.case.out_features, a[4]))
        return self._single[function](self.x, self.A, self.B, plan, self.y)
