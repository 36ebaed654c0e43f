"""Killed anywhere, started again: the losses are those of a job that nobody ever killed."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loquetier_jax.engine import Engine
from loquetier_jax.train.checkpoint import FAULT_POINTS, CheckpointStore, read_state
from loquetier_jax.train.metrics import read_metrics
from tests.engine.engines import reset
from tests.engine.training_process import (
    KILLED,
    SAVE_STEPS,
    STEPS,
    job_engine,
    run,
    start_or_resume,
)

pytestmark = pytest.mark.bits

KILLS = 5
AFTER = 10  # losses compared after the last kill
PATIENCE = 240  # seconds for one process


def numbers(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without their times."""
    return [{k: v for k, v in line.items() if k != "time"} for line in lines]


@pytest.fixture(scope="module")
def engine(compilation_cache_dir: str) -> Engine:
    """The one that trains in this process: all of the reference, and the ends of the killed jobs."""
    return job_engine(compilation_cache_dir)


@pytest.fixture(scope="module")
def reference(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The lines of the job that runs from its beginning to its end in one process."""
    return numbers(start_or_resume(engine, tmp_path_factory.mktemp("whole")).wait().metrics)


@pytest.fixture(scope="module")
def spawn(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., BaseProcess]:
    """Starts processes that train; a server that has imported everything forks them."""
    context, kept = multiprocessing.get_context("forkserver"), tmp_path_factory.mktemp("executables")
    context.set_forkserver_preload(["tests.engine.training_process"])

    def start(folder: Path, point: str = "nowhere", nth: int = 1) -> BaseProcess:
        process = context.Process(target=run, args=(str(kept), str(folder), point, nth))
        process.start()
        return process

    return start


def checkpointed_step(folder: Path) -> int:
    """The step of the newest committed checkpoint, 0 without one."""
    found = CheckpointStore(folder / "checkpoints").committed()
    return read_state(found[-1])["job"]["step"] if found else 0


def last_step(folder: Path) -> int:
    """The last step that metrics.jsonl knows."""
    path = folder / "metrics.jsonl"
    lines = read_metrics(path) if path.is_file() and path.stat().st_size else []
    return lines[-1]["step"] if lines else 0


def finish_here(folder: Path, engine: Engine, reference: list[dict[str, Any]]) -> None:
    """Resumes in this process and compares every line: of the file, and of at least AFTER losses after the kill."""
    at = checkpointed_step(folder)
    assert 0 < at <= STEPS - AFTER
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 9999, "lo')  # the line that the kill cut short
    reset(engine)
    job = start_or_resume(engine, folder).wait()
    lines = numbers(job.metrics)  # the first may be the evaluation that was under way
    assert lines == reference[-len(lines) :]
    assert [line["step"] for line in lines if "loss" in line] == list(range(at + 1, STEPS + 1))
    written = numbers(read_metrics(folder / "metrics.jsonl"))
    assert written == reference, "each step once, whoever wrote it"


@pytest.mark.slow
def test_killed_at_fault_points_of_a_save(
    spawn: Callable[..., BaseProcess],
    reference: list[dict[str, Any]],
    tmp_path: Path,
    engine: Engine,
):
    """One job, killed at one point after the other, each time on the second save of the process."""
    assert len(FAULT_POINTS) == 7
    for point in FAULT_POINTS:
        before = checkpointed_step(tmp_path)
        process = spawn(tmp_path, point, 2)
        process.join(PATIENCE)
        assert process.exitcode == KILLED, point
        assert checkpointed_step(tmp_path) >= before + SAVE_STEPS, f"{point}: the first save of the process counts"
        assert last_step(tmp_path) >= checkpointed_step(tmp_path)
        lines = numbers(read_metrics(tmp_path / "metrics.jsonl"))
        assert lines == reference[: len(lines)]
    finish_here(tmp_path, engine, reference)


@pytest.mark.slow
def test_killed_at_random(
    spawn: Callable[..., BaseProcess], reference: list[dict[str, Any]], tmp_path: Path, engine: Engine
):
    """SIGKILL from outside, wherever the process happens to be."""
    rng = np.random.default_rng(int(time.time()))
    for _ in range(KILLS):
        begin = max(last_step(tmp_path), checkpointed_step(tmp_path))
        process = spawn(tmp_path)
        until, deadline = begin + int(rng.integers(3, 10)), time.monotonic() + PATIENCE
        while last_step(tmp_path) < until and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.003)
        os.kill(process.pid, signal.SIGKILL)
        process.join(PATIENCE)
        assert process.exitcode == -signal.SIGKILL
        lines = numbers(read_metrics(tmp_path / "metrics.jsonl"))
        assert lines == reference[: len(lines)]
    finish_here(tmp_path, engine, reference)
