"""A process that trains one job until it is done or killed, and starts again where the last one was killed."""

import os
from functools import partial
from pathlib import Path

from loquetier_jax.adapters.lora import LoraConfig
from loquetier_jax.config import Bucket
from loquetier_jax.engine import Engine
from loquetier_jax.train.checkpoint import CheckpointStore
from loquetier_jax.train.config import TrainConfig
from loquetier_jax.train.handle import JobHandle
from tests.engine.engines import SERVE, build_engine, random_data

STEPS = 48
SAVE_STEPS = 2
KILLED = 77  # exit code of a process that a fault point has killed
BUCKETS = (
    Bucket(**SERVE, score_packs=1, score_tokens=128),
    Bucket(**SERVE, packs=1, pack_tokens=64),
)
DATA, HELD_OUT = random_data(7, count=24), random_data(8, count=3)


def job_engine(cache: str) -> Engine:
    return build_engine(cache, buckets=BUCKETS)


def start_or_resume(engine: Engine, folder: Path) -> JobHandle:
    """What somebody does after a crash: resume if there is a checkpoint, else begin."""
    if CheckpointStore(folder / "checkpoints").committed():
        return engine.resume_job(folder, DATA, eval_data=HELD_OUT)
    (folder / "metrics.jsonl").unlink(missing_ok=True)  # of a run that was killed before its first save was written
    train = TrainConfig(
        max_steps=STEPS,
        pack_tokens=64,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        eval_steps=5,
        save_steps=SAVE_STEPS,
        output_dir=str(folder),
    )
    return engine.finetune("job", DATA, eval_data=HELD_OUT, lora=LoraConfig(r=8, lora_dropout=0.1), train=train)


def run(cache: str, folder: str, point: str, nth: int) -> None:
    """Trains; exits with KILLED, without any clean-up, when a save gets to `point` for the nth time."""
    seen = 0

    def fault(where: str) -> None:
        nonlocal seen
        seen += where == point
        if seen == nth:
            os._exit(KILLED)

    engine = job_engine(cache)
    engine.job_manager.saver.store = partial(CheckpointStore, fault=fault)
    start_or_resume(engine, Path(folder)).wait()
