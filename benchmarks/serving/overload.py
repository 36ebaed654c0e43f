"""Three times the capacity for two minutes, then nothing: no request fails, the queue drains, memory stays flat."""

import resource
import time

import jax

from benchmarks.results import record
from benchmarks.serving.world import World
from loquetier_jax.cli.replay import replay
from loquetier_jax.cli.report import summarize
from loquetier_jax.cli.workload import Workload, arrivals
from loquetier_jax.config import SLOConfig

OVERLOAD = 3.0  # times the requests a second that the engine completes when all are there at once


def run(world: World) -> list[dict]:
    """overload/3x: failed, drain_s, device_growth_gb, host_growth_gb (peak of the process)."""
    probe, prompt, output, seconds = (12, 40, 8, 3.0) if world.small else (128, 256, 64, 120.0)
    names = world.names(probe, 4)
    capacity = probe / world.seconds(world.prompts(probe, prompt), names, output)
    before, host = device_bytes(), host_bytes()
    rate = OVERLOAD * capacity
    load = Workload(
        rate=rate, num_requests=int(rate * seconds), input_len=(prompt, prompt), output_len=(output, output)
    )
    started = time.perf_counter()
    done = replay(world.engine, arrivals(load, world.adapters[:4]), sampling={"temperature": 0})
    drained = time.perf_counter() - started - seconds
    result = summarize(done, drained + seconds, SLOConfig())
    world.engine.drain()
    world.engine.check_integrity()
    note = f"{load.num_requests} requests, {rate:.0f} a second for {seconds:.0f} s"
    case = f"overload/{OVERLOAD:g}x"
    return [
        record(case, "failed", result["failed"], "requests", bound=0, note=note),
        record(case, "drain_s", drained, "s", bound=OVERLOAD * seconds),
        record(case, "device_growth_gb", (device_bytes() - before) / 1e9, "GB", bound=0.1),
        record(case, "host_growth_gb", (host_bytes() - host) / 1e9, "GB", bound=1.0),
    ]


def device_bytes() -> int:
    """Bytes in use on the device, where it tells."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_in_use", 0)


def host_bytes() -> int:
    """The largest resident size of the process so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
