"""How long `Engine.submit` takes in another thread while a step of a second runs, beside few and many waiting requests.

    python -m benchmarks.scheduling.submit      # on any machine; the model is tiny, the step is made to last

The bound is what an HTTP server may lose to a submit without its other streams noticing.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.results import record, write
from benchmarks.unified.smoke import make_engine
from loquetier_jax import Engine, SamplingParams

WAITING = (8, 8000)
BOUND_MS = 2.0


def slow_steps(engine: Engine, seconds: float) -> None:
    """Makes the device seem to need so long for every step."""
    read = engine.loop.read

    def slowly() -> None:
        time.sleep(seconds)
        read()

    engine.loop.read = slowly


def submit_ms(engine: Engine, waiting: int, count: int) -> list[float]:
    """Milliseconds of `count` submits, a few in each step, once `waiting` requests wait."""
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    while len(engine.loop.serving.waiting) < waiting:
        engine.submit([5, 6, 7, 8], params=params)
    times = []
    for _ in range(count):
        started = time.perf_counter()
        engine.submit([5, 6, 7, 8], params=params)
        times.append(1e3 * (time.perf_counter() - started))
        time.sleep(0.05)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", type=float, default=1.0, help="seconds of a step")
    parser.add_argument("--count", type=int, default=100, help="submits that are measured")
    parser.add_argument("--out", type=Path, help="folder for the result, instead of benchmarks/results")
    args = parser.parse_args()
    engine, records = make_engine(True, 64, 64), []
    long = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    with engine:
        for _ in range(32):  # all slots are taken: whoever comes has to wait
            engine.submit([5, 6, 7, 8], params=long)
        engine.step()
        slow_steps(engine, args.step)
        engine.start()
        for waiting in WAITING:
            times = submit_ms(engine, waiting, args.count)
            extra: dict[str, Any] = {"bound": BOUND_MS}
            records.append(record(f"submit/waiting{waiting}", "median_ms", statistics.median(times), "ms", **extra))
            records.append(record(f"submit/waiting{waiting}", "max_ms", max(times), "ms"))
    for r in records:
        print(f"{r['case']:24} {r['metric']:10} {r['value']:8.3f} {r['unit']}")
    print(write("submit", {"step_s": args.step, "count": args.count}, records, folder=args.out))


if __name__ == "__main__":
    main()
