"""A job moved, saved, paused in the middle of a step goes on as if nothing had happened."""

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from loquetier_jax.adapters.lora import LoraConfig
from loquetier_jax.config import Bucket
from loquetier_jax.engine import Engine
from loquetier_jax.errors import CheckpointError, JobError
from loquetier_jax.models.load import init_random
from loquetier_jax.train.config import TrainConfig
from loquetier_jax.train.data import Dataset
from loquetier_jax.train.home import JobHome
from loquetier_jax.train.manager import JobHandle
from tests.engine.engines import SERVE, greedy, random_data, random_prompt, reset
from tests.engine.traffic import add_adapters, busy_engine

pytestmark = pytest.mark.bits

STEPS = 9
ONE_PACK = (
    Bucket(**SERVE),
    Bucket(**SERVE, score_packs=1, score_tokens=128),
    Bucket(**SERVE, packs=1, pack_tokens=64),
)
"""Passes of one pack, so that a test can stop after any number of them."""
DATA, HELD_OUT = random_data(5, low=20), random_data(6, count=4)


@pytest.fixture(scope="module")
def pair(make_engine: Callable[..., Engine]) -> tuple[Engine, Engine]:
    return busy_engine(make_engine, buckets=ONE_PACK), busy_engine(make_engine, buckets=ONE_PACK)


@pytest.fixture
def engines(pair: tuple[Engine, Engine]) -> Any:
    yield pair
    for engine in pair:
        reset(engine)


def start(engine: Engine, name: str = "job", **changes: Any) -> JobHandle:
    """A job of several packs a step, two pages, dropout, evaluations and a schedule: all that has a state."""
    train = {
        "max_steps": STEPS,
        "pack_tokens": 64,
        "per_device_train_batch_size": 10,
        "eval_steps": 2,
        "learning_rate": 5e-3,
    }
    return engine.finetune(
        name,
        DATA,
        eval_data=HELD_OUT,
        lora=LoraConfig(r=20, lora_dropout=0.1, target_modules="all-linear"),
        train=TrainConfig(**(train | changes)),
    )


def numbers(*jobs: JobHandle) -> list[dict[str, float]]:
    """All lines without their times."""
    return [{k: v for k, v in line.items() if k != "time"} for job in jobs for line in job.metrics]


def masters(engine: Engine, name: str = "job") -> list[np.ndarray]:
    weights = engine.adapters.weights(engine.adapters.get(name))
    return [a for key in sorted(weights) for a in (weights[key]["lora_A"], weights[key]["lora_B"])]


@pytest.fixture(scope="module")
def uninterrupted(make_engine: Callable[..., Engine]) -> tuple[list[dict[str, float]], list[np.ndarray]]:
    """Lines and result of the job left alone."""
    engine = busy_engine(make_engine, buckets=ONE_PACK)
    job = start(engine).wait()
    return numbers(job), masters(engine)


def to_the_middle(engine: Engine, job: JobHandle, step: int = 2, packs: int | None = 1) -> None:
    """Drives until `packs` packs of optimizer step `step` have been dispatched; None is all of them."""
    inner = job.device_job.job
    assert inner.stream.packs_in_step(step) > 4
    at = (step + 1, 0) if packs is None else (step, packs)
    engine.wait(lambda: (inner.cursor.step, inner.cursor.pack) == at)


def assert_same(got: tuple[list[dict[str, float]], list[np.ndarray]], want: Any) -> None:
    assert got[0] == want[0]
    assert all((a == b).all() for a, b in zip(got[1], want[1], strict=True))


def assert_empty(engine: Engine) -> None:
    """Nothing of the job is left but what it published."""
    engine.wait(lambda: not engine.loop.training.device_jobs)
    engine.drain()
    engine.check_integrity()
    assert engine.loop.training.grad_pool.num_free == engine.cfg.train_pages
    assert "jobs" not in engine.adapters.pool.owners()


@pytest.mark.parametrize("packs", [1, 3, None])
def test_migration_in_the_middle_of_accumulation(engines: Any, uninterrupted: Any, packs: int | None):
    first, second = engines
    add_adapters(second)  # pages, ids and co-tenants differ over there
    company = second.submit(random_prompt(np.random.default_rng(0), 30), "r24", greedy(60))
    job = start(first)
    to_the_middle(first, job, packs=packs)
    moved = job.migrate(second)
    assert job.status == "cancelled" and moved.status in ("queued", "running")
    assert_empty(first)
    moved.wait()
    assert_same((numbers(job, moved), masters(second)), uninterrupted)
    second.wait(lambda: company.finished)
    assert_empty(second)


def test_migration_there_and_back_beside_another_job(engines: Any, uninterrupted: Any):
    first, second = engines
    job, other = start(first), start(second, "other", seed=1)
    handles = [job]
    for step, target in ((1, second), (3, first), (4, second)):
        to_the_middle(first if target is second else second, handles[-1], step)
        handles.append(handles[-1].migrate(target))
    handles[-1].wait()
    assert_same((numbers(*handles), masters(second)), uninterrupted)
    other.wait()
    assert_empty(first)
    assert_empty(second)


def test_a_job_that_has_not_started_migrates(engines: Any, uninterrupted: Any):
    first, second = engines
    job = start(first)
    assert job.status == "queued"
    moved = job.migrate(second).wait()
    assert_same((numbers(moved), masters(second)), uninterrupted)
    assert_empty(first)


def test_opposite_migrations_at_once(
    make_engine: Callable[..., Engine], uninterrupted: Any, monkeypatch: pytest.MonkeyPatch
):
    """Each thread had the lock of one engine and waited for the other's, for ever."""
    engines = [busy_engine(make_engine, buckets=ONE_PACK) for _ in range(2)]  # own ones: they might never be free again
    jobs = [start(engine, f"job-{i}") for i, engine in enumerate(engines)]
    for engine, job in zip(engines, jobs, strict=True):
        to_the_middle(engine, job)

    met, take_state = threading.Barrier(2), JobHome.take_state

    def meets(*args: Any) -> Any:
        with suppress(threading.BrokenBarrierError):  # the other is kept out by a lock, and comes later
            met.wait(0.2)
        return take_state(*args)

    monkeypatch.setattr(JobHome, "take_state", meets)
    moved: dict[int, JobHandle] = {}
    threads = [
        threading.Thread(target=lambda i=i: moved.update({i: jobs[i].migrate(engines[1 - i])}), daemon=True)
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(moved) == [0, 1]
    for i, job in moved.items():
        job.wait()
        assert_same((numbers(jobs[i], job), masters(engines[1 - i], job.name)), uninterrupted)
    for engine in engines:
        assert_empty(engine)


def test_checkpoint_in_the_middle_of_accumulation(engines: Any, uninterrupted: Any, tmp_path: Path):
    first, second = engines
    job = start(first)
    to_the_middle(first, job)
    before = numbers(job)
    job.checkpoint(tmp_path / "ckpt")
    job.wait()
    assert_same((numbers(job), masters(first)), uninterrupted)
    resumed = second.resume_job(tmp_path / "ckpt", DATA, eval_data=HELD_OUT).wait()
    assert_same((before + numbers(resumed), masters(second)), uninterrupted)


def test_checkpoint_in_the_middle_of_an_evaluation(engines: Any, uninterrupted: Any, tmp_path: Path):
    first, second = engines
    job = start(first)
    first.wait(lambda: job.device_job.job.evaluating)
    before = numbers(job)
    job.checkpoint(tmp_path)
    resumed = second.resume_job(tmp_path, DATA, eval_data=HELD_OUT)
    second.compiler.wait()  # then the evaluation is the first and only thing to do
    resumed.wait()
    lines = before + [line for line in numbers(resumed) if line not in before]
    assert_same((lines, masters(second)), uninterrupted)


def test_a_queued_job_gets_the_pages_of_one_that_ends(engines: Any):
    """The one that waits was there first, and its turn comes in the very step in which nothing else is left to do."""
    engine, _ = engines
    engine.compiler.wait()
    holders = [start(engine, f"holder-{i}", max_steps=1) for i in range(2)]
    engine.wait(lambda: all(h.status == "running" for h in holders))
    waiting = start(engine, "waiting", max_steps=1)
    device_jobs = engine.loop.training.device_jobs
    device_jobs |= {h.name: device_jobs.pop(h.name) for h in holders}  # now it comes first in each round
    engine.compiler.wait()
    assert waiting.wait().status == "succeeded"


def test_a_job_that_succeeded_resumes_as_such_and_serves(engines: Any, uninterrupted: Any, tmp_path: Path):
    first, second = engines
    job = start(first).wait()
    job.checkpoint(tmp_path)
    resumed = second.resume_job(tmp_path, DATA, eval_data=HELD_OUT).wait()
    assert (resumed.status, resumed.step) == ("succeeded", STEPS)
    assert_same((numbers(job), masters(second)), uninterrupted)
    prompt = random_prompt(np.random.default_rng(1), 9)
    here, there = (e.generate([prompt], "job", greedy())[0].outputs[0].token_ids for e in engines)
    assert here == there
    assert_empty(second)


def test_a_run_that_was_moved_goes_on_where_it_lies(engines: Any, uninterrupted: Any, tmp_path: Path):
    first, second = engines
    job = start(first, output_dir=str(tmp_path / "old"), save_steps=1)
    to_the_middle(first, job, step=2)
    job.cancel()
    assert_empty(first)
    (tmp_path / "old").rename(tmp_path / "new")
    resumed = second.resume_job(tmp_path / "new", DATA, eval_data=HELD_OUT).wait()
    assert not (tmp_path / "old").exists()
    lines = [json.loads(line) for line in (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()]
    wanted = [line for line in uninterrupted[0] if "loss" in line]
    assert [line["loss"] for line in lines if "loss" in line] == [line["loss"] for line in wanted]
    assert_same(([], masters(second, resumed.name)), ([], uninterrupted[1]))


def test_pause_resume_and_cancel(engines: Any, uninterrupted: Any):
    engine, _ = engines
    job = start(engine)
    job.pause()  # while it is queued
    with pytest.raises(JobError, match="paused"):
        job.wait()
    job.resume()
    to_the_middle(engine, job)
    job.pause()
    while engine.step():
        pass
    at = job.device_job.job.cursor
    assert not engine.step() and job.device_job.job.cursor == at and job.status == "paused"
    job.resume()
    job.wait()
    assert_same((numbers(job), masters(engine)), uninterrupted)

    second = start(engine, "second")
    to_the_middle(engine, second)
    second.cancel()
    assert second.status == "cancelled"
    assert_empty(engine)
    for act in (second.cancel, second.pause, second.resume, second.publish):
        with pytest.raises(JobError, match="cancelled"):
            act()
    again = engine.finetune("second", DATA, train=TrainConfig(max_steps=1, pack_tokens=64), replace=True)
    assert again.wait().status == "succeeded"


def test_what_cannot_move_is_refused(engines: Any, make_engine: Callable[..., Engine], tmp_path: Path):
    first, second = engines
    job = start(first)
    with pytest.raises(JobError, match="on"):
        job.migrate(first)
    with pytest.raises(JobError, match="other: got None, expected another Engine"):
        job.migrate(None)
    start(second)
    with pytest.raises(JobError, match="has not ended"):
        job.migrate(second)
    other = busy_engine(make_engine, buckets=ONE_PACK)
    other.state.params = init_random(other.spec, jax.random.key(9), np.float32)
    with pytest.raises(CheckpointError, match="another base"):
        job.migrate(other)
    second.jobs["job"].cancel()
    to_the_middle(first, job)
    path = job.checkpoint(tmp_path)
    assert job.status == "running", "whatever was refused, the job goes on"
    with pytest.raises(CheckpointError, match="data"):
        second.resume_job(path, Dataset("other", DATA.samples[1:]), eval_data=HELD_OUT)
    with pytest.raises(CheckpointError, match="eval_data"):
        second.resume_job(path, DATA)
