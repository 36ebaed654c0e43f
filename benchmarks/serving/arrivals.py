"""Requests that arrive at random: latencies at several rates, under the names of `vllm bench serve`."""

import time

from benchmarks.results import record
from benchmarks.serving.world import World
from loquetier_jax.cli.replay import replay
from loquetier_jax.cli.report import summarize
from loquetier_jax.cli.workload import Workload, arrivals
from loquetier_jax.config import SLOConfig

SECONDS = 12.0  # of arrivals at each rate
METRICS = {
    "median_ttft_ms": "ms",
    "p99_ttft_ms": "ms",
    "median_tpot_ms": "ms",
    "p99_tpot_ms": "ms",
    "p99_itl_ms": "ms",
    "request_throughput": "req/s",
    "output_throughput": "tok/s",
}


def run(world: World) -> list[dict]:
    """arrivals/<requests a second>x512x128/n4: Poisson arrivals, in turn on four adapters."""
    rates, lengths = ((20.0,), (40, 8)) if world.small else ((4.0, 8.0, 16.0, 24.0), (512, 128))
    records = []
    for rate in rates:
        result = served(world, rate, lengths, world.adapters[:4])
        case = f"arrivals/{rate:g}x{lengths[0]}x{lengths[1]}/n4"
        records += [record(case, name, result[name], unit) for name, unit in METRICS.items()]
        if result["failed"]:
            raise RuntimeError(f"{case}: {result['failures']}")
    return records


def served(world: World, rate: float, lengths: tuple[int, int], adapters: list[str], assign: str = "round-robin"):
    """What `summarize` says of a replay at this rate."""
    seconds = 2.0 if world.small else SECONDS
    prompt, output = lengths
    workload = Workload(
        rate=rate, num_requests=int(rate * seconds), input_len=(prompt, prompt), output_len=(output, output),
        assign=assign,
    )  # fmt: skip
    started = time.perf_counter()
    done = replay(world.engine, arrivals(workload, adapters), sampling={"temperature": 0})
    return summarize(done, time.perf_counter() - started, SLOConfig())
