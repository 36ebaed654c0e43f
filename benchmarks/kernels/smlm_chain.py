"""Cases of the SMLM benchmarks, and the device time of a call: chains of calls over rotated adapters.

Every call of a chain reads its own adapter pages, in all more than the L2 cache holds, and waits for the call before,
so calls neither overlap nor find their weights cached. The chain is repeated by a loop on the device: a dispatch is
some milliseconds. What starting one and waiting for it costs is no part of a figure.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.results import record
from pallas_kernels.smlm import RANK_PAGE, TILE, WIDE, SmlmPlan, build_plan

BF16 = jnp.bfloat16
POOL_BYTES = 1 << 27  # more than twice the L2 of an H200: what a chain touches before it touches it again
CHAIN_MS = 6.0  # what one dispatch should take
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
    "dec40": lambda n: [40 // n] * n,
    "dec256": lambda n: [256 // n] * n,
    "pre2048": lambda n: [2048 // n] * n,
    "pre2560": lambda n: [2560 // n] * n,
    "mixed": lambda n: [1024, 256, 256] + [4] * (n - 3),
}
# Projection groups of an 8B model, which no peer was measured on: one launch pair for stacked targets.
GROUPS = {"qkv": (4096, (4096, 1024, 1024)), "gate_up": (4096, (14336, 14336)), "down": (14336, (4096,))}


@dataclass(frozen=True)
class Case:
    """One shape and batch; rows of adapter i are the i-th run, ranks[i] its rank."""

    name: str
    size: int
    out_features: tuple[int, ...]
    ranks: tuple[int, ...]
    runs: tuple[int, ...]

    @property
    def rows(self) -> int:
        return sum(self.runs)

    @property
    def pages(self) -> tuple[int, ...]:
        return tuple(math.ceil(rank / RANK_PAGE) for rank in self.ranks)

    @property
    def adapter_bytes(self) -> int:
        """A and B of all adapters of the case, bf16."""
        return 2 * sum(self.pages) * RANK_PAGE * (self.size * len(self.out_features) + sum(self.out_features))

    @property
    def row_bytes(self) -> int:
        """x and y, bf16."""
        return 2 * self.rows * (self.size + sum(self.out_features))

    @property
    def floor_us(self) -> float:
        """Bytes of x, y in and out, A and B over the measured bandwidth: what cold memory allows."""
        data = self.row_bytes + 2 * self.rows * sum(self.out_features) + self.adapter_bytes
        return data / READ_WRITE * 1e6

    def part(self, i: int) -> "Case":
        """The i-th adapter's rows alone."""
        return Case(f"{self.name}/{i}", self.size, self.out_features, (self.ranks[i],), (self.runs[i],))


def make_case(name: str) -> Case:
    """A case from its path: `4096x4096/r16/dec32/n4`, `gate_up/r16/dec32/n4`, `4096x4096/r8-128/dec40/n5`."""
    shape, rank, batch, adapters = name.split("/")
    size, out = GROUPS[shape] if shape in GROUPS else (int(shape.split("x")[0]), (int(shape.split("x")[1]),))
    runs = BATCHES[batch](int(adapters[1:]))
    low, _, high = rank[1:].partition("-")
    ranks = [int(low) << i for i in range(len(runs))] if high else [int(low)] * len(runs)
    return Case(name, size, out, tuple(ranks), tuple(runs))


@cache
def _pool(size: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (size,), BF16)


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _cut(pool: jax.Array, stream: int, count: int, shape: tuple[int, ...], scale: float) -> list[jax.Array]:
    size = math.prod(shape)
    flat = jnp.tile(jnp.roll(pool, 12345 * stream), -(-count * size // pool.size))[: count * size]
    return list((flat * BF16(scale)).reshape(count, *shape))


def noise(stream: int, count: int, *shape: int, scale: float = 1.0) -> list[jax.Array]:
    """`count` arrays of normal bfloat16 numbers, each stream from a place of its own in one pool."""
    return _cut(_pool(min(1 << 26, max(1 << 16, count * math.prod(shape)))), stream, count, shape, scale)


def slope_us(run: Callable[[int], None], calls: int, *, repeats: int = 7) -> float:
    """Median microseconds of one call, by wall clock.

    Args:
        run: run(n) makes n dispatches back to back and waits for the last.
        calls: Calls in a dispatch.
        repeats: Timings.
    """

    def seconds(dispatches: int) -> float:
        start = time.perf_counter()
        run(dispatches)
        return time.perf_counter() - start

    run(1)
    # The difference leaves out what does not grow with the work: the first launch, and the wait at the end.
    times = sorted(seconds(5) - seconds(1) for _ in range(repeats))
    return times[repeats // 2] / (4 * calls) * 1e6


@jax.jit
def worst_error(got: jax.Array, want: jax.Array) -> jax.Array:
    """Largest difference over the largest magnitude."""
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return jnp.abs(got - want).max() / jnp.abs(want).max()


class Chain:
    """A chain of calls, repeated by a loop on the device.

    Attributes:
        calls: Calls of one turn.
        state: What a turn changes: arrays in any tree; dispatches get copies, and donate them.
        args: What turns read.
    """

    calls: int
    state: Any
    args: tuple[Any, ...]

    def turn(self, function: Callable[..., Any], state: Any, *args: Any) -> Any:
        """One turn of calls of `function`, traced: the next state."""
        raise NotImplementedError

    def compile(self, function: Callable[..., Any], loops: int = 1) -> Any:
        """`loops` turns as one executable, the state donated."""

        def chain(state: Any, *args: Any) -> Any:
            return lax.fori_loop(0, loops, lambda _, state: self.turn(function, state, *args), state)

        return jax.jit(chain, donate_argnums=0).lower(self.state, *self.args).compile()

    def loops(self, guess_us: float) -> int:
        """Turns that make a dispatch of about CHAIN_MS."""
        return max(1, round(CHAIN_MS * 1e3 / (self.calls * guess_us)))

    def dispatch(self, executable: Any, state: Any = None) -> Any:
        """The state after one dispatch; `state` is donated, by default it is a copy of the first."""
        return executable(jax.tree.map(jnp.copy, self.state) if state is None else state, *self.args)

    def time_us(self, executable: Any, loops: int = 1, *, repeats: int = 7) -> float:
        """Median microseconds of one call."""
        state = jax.block_until_ready(self.dispatch(executable))

        def run(dispatches: int) -> None:
            nonlocal state
            for _ in range(dispatches):
                state = self.dispatch(executable, state)
            jax.block_until_ready(state)

        return slope_us(run, loops * self.calls, repeats=repeats)


@dataclass
class Timing:
    """One figure to come: a function on a chain. Compiled first, many at once; timed later, alone."""

    name: str
    metric: str
    bench: Chain
    function: Callable[..., Any]
    guess_us: float
    extra: dict[str, Any] = field(default_factory=dict)
    repeats: int = 7

    def compile(self) -> None:
        self.loops = self.bench.loops(self.guess_us)
        self.executable = self.bench.compile(self.function, self.loops)

    def record(self) -> dict[str, Any]:
        us = self.bench.time_us(self.executable, self.loops, repeats=self.repeats)
        return record(f"smlm/{self.name}", self.metric, us, "us", **self.extra)


class Bench(Chain):
    """Arrays and the plan of one case.

    `calls` calls have A and B of their own and share the plan, as the layers of a model do. With `cold`, x and y
    rotate too; without, they are the same arrays in every call, which is how the peers were measured.
    """

    def __init__(self, case: Case, *, cold: bool = False, max_calls: int = 120) -> None:
        self.case = case
        out, targets, pages = sum(case.out_features), len(case.out_features), 1 + sum(case.pages)
        self.calls = max(8, min(max_calls, -(-POOL_BYTES // case.adapter_bytes)))
        copies = max(2, min(self.calls, -(-POOL_BYTES // case.row_bytes))) if cold else 1
        x = noise(0, copies, case.rows, case.size)
        A = noise(2, self.calls, pages, targets * RANK_PAGE, case.size)
        B = noise(3, self.calls, pages, RANK_PAGE, out, scale=case.size**-0.5)
        plan = jax.tree.map(jnp.asarray, self._build_plan())
        self.state = (noise(1, copies, case.rows, out), plan.counters)
        self.args = (x, A, B, plan)

    def _build_plan(self) -> SmlmPlan:
        """With no tile to spare."""
        case, segments, first, page = self.case, [], 0, 1
        order = 1 + np.random.default_rng(0).permutation(sum(case.pages))
        for rows, count in zip(case.runs, case.pages, strict=True):
            segments.append((first, rows, tuple(order[page - 1 : page - 1 + count].tolist())))
            first, page = first + rows, page + count
        tiles, num_wide = (sum(-(-rows // height) for rows in case.runs) for height in (TILE, WIDE))
        return build_plan(segments, case.rows, tiles, max(case.pages), num_wide)

    def turn(self, function: Callable[..., Any], state: Any, *args: Any) -> Any:
        """Each call adds into the y of the call before; the state is y, and the plan's counters."""
        (x, A, B, plan), (y, counters) = args, state
        y = list(y)
        for i, (a, b) in enumerate(zip(A, B, strict=True)):
            copy, plan = i % len(y), replace(plan, counters=counters)
            # Without the barrier XLA hoists what needs no y: it would run all shrinks first.
            one, y = lax.optimization_barrier((x[copy], y))
            y[copy], counters = function(one, a, b, plan, self.case.out_features, y[copy])
        return y, counters

    def result(self, function: Callable[..., Any]) -> jax.Array:
        """y of the first call, to compare implementations."""
        x, A, B, plan = self.args
        call = jax.jit(lambda *args: function(*args[:4], self.case.out_features, args[4])[0])
        return call(x[0], A[0], B[0], plan, self.state[0][0])
