"""Restores a job from `Job.state_dict`."""

import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

from loquetier_jax.config import require
from loquetier_jax.train.config import TrainConfig
from loquetier_jax.train.data import Dataset
from loquetier_jax.train.data_identity import check_same_data
from loquetier_jax.train.job import Job
from loquetier_jax.train.metrics import MetricsWriter
from loquetier_jax.train.packing import Cursor


def restore_job(
    state: dict[str, Any],
    data: Dataset,
    eval_data: Dataset | None = None,
    *,
    metrics: MetricsWriter | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    clock: Callable[[], float] = time.time,
    go_on: bool = False,
) -> Job:
    """A job that continues with the same packs and the same results.

    Args:
        state: From `Job.state_dict`; its config may have changed (`changes.changed_config`).
        data, eval_data: The original data, verified by hash.
        metrics: Truncated to its length at the time of the state; lines of later steps will be written again.
        loss: The loss function, if the job has a custom one.
        clock: Wall-clock time, seconds.
        go_on: Whether the job must have steps left; if it had succeeded, it is queued again.

    Raises:
        CheckpointError: different data, or a metrics file shorter than it was.
        ConfigError: the loss function is missing, or no steps are left.
    """
    cfg = TrainConfig.from_dict(state["config"], loss=loss)
    check_same_data("data", data, state["data"])
    check_same_data("eval_data", eval_data, state["eval_data"])
    job = Job(
        state["name"],
        cfg,
        data,
        eval_data,
        metrics=metrics,
        clock=clock,
        tokenized_at=datetime.fromisoformat(state["tokenized_at"]),
        untrained=state["untrained"],
    )
    done = job.step = job.saved_step = state["step"]
    require(not go_on or job.total_steps > done, "max_steps", job.total_steps, f"more than the {done} that are done")
    job.status, job.error, job.paused_from = state["status"], state["error"], state["paused_from"]
    job.cursor = Cursor(**state["cursor"])
    job.record.load_state(state["record"])
    if job.evaluation is not None:
        job.evaluation.load_state(state["evaluation"])
    if go_on and job.status == "succeeded":
        job.status = "queued"
    if go_on and job.evaluation is not None:
        job.evaluation.misses = 0  # early stopping counts anew
    return job
