"""What `python -m tests.fuzz` does: mutated inputs of every kind, and a result file that says what became of them."""

import argparse
import logging
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import tests.conftest  # noqa: F401  (sets the environment, before anything imports jax)

from benchmarks.results import record, write  # isort: skip
from tests.fuzz.kind import MOST_GROWTH, Outcome, fuzz
from tests.fuzz.kinds import KINDS


def _run(name: str, count: int, seed: int) -> Outcome:
    logging.disable(logging.ERROR)  # of data that was cut or left out, of listeners that are none
    with tempfile.TemporaryDirectory() as folder:
        return fuzz(KINDS[name], Path(folder), count, seed)


def _records(name: str, outcome: Outcome) -> list[dict[str, Any]]:
    case, mib = f"{name}/seed{outcome.seed}", 2**20
    figures = [("inputs", outcome.count, "inputs"), ("accepted", outcome.accepted, "inputs")]
    figures += [(f"refused: {error}", count, "inputs") for error, count in sorted(outcome.refused.items())]
    figures += [("seconds", outcome.seconds, "s"), ("slowest input", outcome.slowest, "s")]
    figures += [("rss after the first tenth", outcome.rss_first / mib, "MiB")]
    figures += [("rss after the last", outcome.rss_last / mib, "MiB")]
    growth = record(case, "rss after the last / after the first tenth", round(outcome.growth, 4), "", bound=MOST_GROWTH)
    return [*(record(case, metric, round(value, 3), unit) for metric, value, unit in figures), growth]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="inputs of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the first input")
    parser.add_argument("--kind", action="append", choices=KINDS, help="of these kinds alone; may be repeated")
    parser.add_argument("--out", type=Path, help="folder of the result file")
    return parser


def main() -> None:
    """Each kind in a process of its own, so that its memory is its own; one after the other."""
    given = _parser().parse_args()
    kinds, records = given.kind or list(KINDS), []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for name in kinds:
            outcome = pool.submit(_run, name, given.count, given.seed).result()
            print(f"{name}: {outcome}, memory x {outcome.growth:.3f}", flush=True)
            if outcome.growth > MOST_GROWTH:
                raise SystemExit(f"{name}: memory grew {outcome.growth:.3f} times, expected <= {MOST_GROWTH}")
            records += _records(name, outcome)
            done = kinds[: kinds.index(name) + 1]
            if given.out:  # after each: what was found is kept when it is interrupted
                write("fuzz", {"count": given.count, "seed": given.seed, "kinds": done}, records, given.out)
