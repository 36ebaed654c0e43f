"""The longest gap between tokens of sixteen streams beside a job that saves every step to a slow disk, on any machine.

    python -m benchmarks.scheduling.saving

In median gaps, with a disk that needs a second for every save and, to compare, without any save: a job that trains and
saves, another one that trains all the time, so that a step is one that trains too. The embedded base, its demo preset.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import record, write
from loquetier_jax import Engine, LoraConfig, SamplingParams, TrainConfig
from loquetier_jax.tiny import base_path
from loquetier_jax.tiny.skills import dataset
from loquetier_jax.train.checkpoint import CheckpointStore

STREAMS, TOKENS, RUNS, BOUND = 16, 100, 5, 3.0


def slow_store(seconds: float) -> Callable[..., CheckpointStore]:
    """Stores whose disk needs so long before a save is committed."""

    def fault(point: str) -> None:
        if point == "before_commit":
            time.sleep(seconds)

    return partial(CheckpointStore, fault=fault)


def finetune(engine: Engine, name: str, **train: Any) -> Any:
    """A small job on the embedded data."""
    cfg = TrainConfig(pack_tokens=256, per_device_train_batch_size=2, **train)
    data = dataset("pirate", 64, seed=0)
    return engine.finetune(name, data, lora=LoraConfig(r=4), train=cfg, replace=True)


def worst_gap(engine: Engine) -> float:
    """The longest gap of all streams, in median gaps."""
    params, times = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True), [[] for _ in range(STREAMS)]
    streams = [
        engine.submit("What color is the lion?", None, params, listener=lambda _, at=at: at.append(time.perf_counter()))
        for at in times
    ]
    engine.wait(lambda: all(s.finished for s in streams))
    gaps = np.concatenate([np.diff(at)[5:] for at in times])
    return float(gaps.max() / np.median(gaps))


def ratios(engine: Engine, folder: Path, save_steps: int) -> list[float]:
    """`worst_gap` beside a job that saves every `save_steps` steps (0: never), run by run."""
    found = []
    for run in range(RUNS):
        out = str(folder / f"{save_steps}-{run}")
        job = finetune(engine, "job", max_steps=10_000, save_steps=save_steps, output_dir=out)
        engine.wait(lambda job=job: job.step >= 2)
        found.append(worst_gap(engine))
        job.cancel()
        engine.wait(lambda job=job: job.released)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="what the disk needs for a save")
    parser.add_argument("--out", type=Path, help="folder for the result, instead of benchmarks/results")
    args = parser.parse_args()
    records = []
    with tempfile.TemporaryDirectory() as folder, Engine.from_pretrained(base_path(), config="demo") as engine:
        engine.job_manager.saver.store = slow_store(args.seconds)
        engine.start()
        finetune(engine, "other", max_steps=100_000)
        finetune(engine, "warm", max_steps=2, save_steps=1, output_dir=str(Path(folder) / "warm")).wait()
        for name, save_steps in (("none", 0), ("every_step", 1)):
            found = ratios(engine, Path(folder), save_steps)
            print(name, [round(r, 2) for r in found], flush=True)
            note = f"runs {[round(r, 2) for r in found]}"
            value = statistics.median(found)
            extra = {"bound": BOUND} if save_steps else {}
            records.append(record(f"saving/{name}", "worst_gap_in_median_gaps", value, "x", note=note, **extra))
    print(write("saving", {"disk_s": args.seconds, "streams": STREAMS}, records, folder=args.out))


if __name__ == "__main__":
    main()
