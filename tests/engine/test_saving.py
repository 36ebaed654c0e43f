"""A disk that takes its time: it is waited for by the job whose next save is due, and by nobody else."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loquetier_jax.engine import Engine
from loquetier_jax.train.checkpoint import CheckpointStore
from loquetier_jax.train.handle import JobHandle
from loquetier_jax.train.job_state import read_job_state
from tests.engine.engines import greedy, random_data
from tests.engine.evidence import LORA, bits, curve, prompts, quick

pytestmark = pytest.mark.bits

DATA = random_data(0)
PATIENCE = 60  # seconds, for threads that have nothing to wait for any more


class Gate:
    """Where a save stops until it is opened.

    Args:
        point: One of FAULT_POINTS; or "before_copy": nothing of the job's state has been copied.
    """

    def __init__(self, point: str) -> None:
        self.point, self.reached, self.opened = point, threading.Event(), threading.Event()

    def pass_(self, point: str) -> None:
        if point == self.point:
            self.reached.set()
            assert self.opened.wait(PATIENCE)

    def store(self, folder: Path, *, keep: int) -> CheckpointStore:
        """Stands in for `CheckpointWriter.store`."""
        self.pass_("before_copy")
        return CheckpointStore(folder, keep=keep, fault=self.pass_)


@pytest.fixture
def gated(tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Gate]]:
    """point -> a Gate that the engine's saves pass; open at the end of the test."""
    gates: list[Gate] = []

    def gate(point: str) -> Gate:
        gates.append(Gate(point))
        monkeypatch.setattr(tiny_engine.job_manager.saver, "store", gates[-1].store)
        return gates[-1]

    yield gate
    for one in gates:
        one.opened.set()


def finetune(engine: Engine, name: str, folder: Path | None = None, **changes: Any) -> JobHandle:
    """A job of six steps that saves every other one in `folder`."""
    saves = {} if folder is None else {"save_steps": 2, "output_dir": str(folder)}
    return engine.finetune(name, DATA, lora=LORA, train=quick(**({"max_steps": 6} | saves | changes)))


@pytest.fixture(scope="module")
def quick_run(session_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], dict[int, Any]]:
    """(curve, what each checkpoint holds by step) of a job whose disk takes no time."""
    folder = tmp_path_factory.mktemp("quick")
    job = finetune(session_engine, "quick", folder, save_total_limit=3).wait()
    return curve(job), saved(session_engine, folder)


def saved(engine: Engine, folder: Path) -> dict[int, Any]:
    """step -> the bits of a checkpoint's arrays, and the numbers beside them."""
    states = [read_job_state(engine.spec, path) for path in CheckpointStore(folder / "checkpoints").committed()]
    numbers = ("status", "step", "cursor", "record")
    jobs = [state.host["job"] for state in states]
    for job in jobs:
        job["record"].pop("position")  # of a file with times in it
    return {j["step"]: (bits(s.arrays), [j[k] for k in numbers]) for s, j in zip(states, jobs, strict=True)}


def serve(engine: Engine, max_tokens: int = 20) -> None:
    """Sixteen streams from their first to their last token."""
    outputs = engine.generate(prompts(0, *range(5, 21)), None, greedy(max_tokens))
    assert [len(output.outputs[0].token_ids) for output in outputs] == [max_tokens] * 16


def test_a_save_that_takes_long_holds_up_its_job_alone(
    tiny_engine: Engine, tmp_path: Path, gated: Any, quick_run: Any
) -> None:
    """Streams and other jobs go on, and so does the job until its next save is due; then all is as with a fast disk."""
    engine, gate = tiny_engine, gated("before_commit")
    job, other = finetune(engine, "job", tmp_path, save_total_limit=3), finetune(engine, "other", max_steps=50)
    engine.wait(lambda: job.step == 4)
    assert gate.reached.wait(PATIENCE)
    at = other.step
    serve(engine)
    engine.wait(lambda: other.step >= at + 5)
    assert (job.step, job.status) == (4, "running") and job.device_job.job.in_flight == 0
    assert not saved(engine, tmp_path)
    gate.opened.set()
    assert curve(job.wait()) == quick_run[0]
    assert saved(engine, tmp_path) == quick_run[1]
    other.cancel()


def test_no_optimizer_step_overwrites_what_is_being_copied(
    tiny_engine: Engine, tmp_path: Path, gated: Any, quick_run: Any
) -> None:
    """Packs go on meanwhile, up to the step; masters are donated through it."""
    engine, gate = tiny_engine, gated("before_copy")
    job = finetune(engine, "job", tmp_path, save_total_limit=3)
    inner = job.device_job.job
    engine.wait(lambda: inner.step == 2 and inner.cursor.step == 3)
    serve(engine)
    assert job.step == 2 and inner.step_due, "all packs are in, and the step has not been dispatched"
    gate.opened.set()
    assert curve(job.wait()) == quick_run[0]
    assert saved(engine, tmp_path) == quick_run[1]


def test_a_job_that_is_cancelled_is_saved_to_the_end(
    tiny_engine: Engine, tmp_path: Path, gated: Any, quick_run: Any
) -> None:
    """Nobody else gets its folder before, and what was saved resumes with the identical next loss."""
    engine, gate = tiny_engine, gated("after_rename")
    job = finetune(engine, "job", tmp_path)
    engine.wait(lambda: job.step == 3)
    job.cancel()
    serve(engine)
    assert not job.released
    gate.opened.set()
    engine.wait(lambda: job.released)
    resumed = engine.resume_job(tmp_path, DATA)
    assert resumed.step == 2
    assert curve(resumed.wait()) == quick_run[0][2:]


def test_wait_returns_after_the_last_save(tiny_engine: Engine, tmp_path: Path, gated: Any) -> None:
    engine, gate = tiny_engine, gated("before_commit")
    job = finetune(engine, "job", tmp_path, save_steps=6)
    engine.start()
    try:
        engine.wait(lambda: job.status == "succeeded")
        waiting = threading.Thread(target=job.wait)
        waiting.start()
        serve(engine)
        assert waiting.is_alive() and not job.released and engine.job_manager.saver.busy
        gate.opened.set()
        waiting.join(PATIENCE)
        assert not waiting.is_alive() and job.released
        assert list(saved(engine, tmp_path)) == [6] and job.device_job.job.saved_step == 6
    finally:
        gate.opened.set()
        engine.stop()


def test_a_checkpoint_on_demand_keeps_nobody_else_waiting(
    tiny_engine: Engine, tmp_path: Path, gated: Any, quick_run: Any
) -> None:
    """It was written with the engine's lock held. Two of them at once take turns, and waits for the job go on."""
    engine, gate = tiny_engine, gated("before_commit")
    job, other = finetune(engine, "job"), finetune(engine, "other", max_steps=50)
    engine.wait(lambda: job.step == 2)
    made: list[Path] = []
    threads = [threading.Thread(target=lambda: made.append(job.checkpoint(tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert gate.reached.wait(PATIENCE)
    at = other.step
    serve(engine)
    engine.wait(lambda: other.step >= at + 5)
    assert job.step == 2 and job.status == "running" and not made
    threads.append(threading.Thread(target=job.wait))
    threads[-1].start()
    gate.opened.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert {path.name for path in made} == {"checkpoint-00000001", "checkpoint-00000002"}
    assert job.status == "succeeded" and curve(job) == quick_run[0]
    resumed = engine.resume_job(tmp_path, DATA)
    assert resumed.step == 2 and curve(resumed.wait()) == quick_run[0][2:]
    other.cancel()


def test_the_base_is_hashed_once_and_not_in_the_loop(make_engine: Callable[..., Engine], tmp_path: Path) -> None:
    """And an engine that is closed writes what it has begun."""
    engine = make_engine()
    home, threads, gate = engine.job_manager.home, [], Gate("before_commit")
    hash_base, engine.job_manager.saver.store = home.hash_base, gate.store

    def hashed(spec: Any, params: Any) -> str:
        threads.append(threading.current_thread())
        return hash_base(spec, params)

    home.hash_base = hashed
    engine.start()
    finetune(engine, "none", max_steps=1).wait()
    assert not threads, "a job that is never saved needs none"
    job = finetune(engine, "job", tmp_path)
    assert threads == [threading.current_thread()]
    assert gate.reached.wait(PATIENCE)
    closing = threading.Thread(target=engine.close)
    closing.start()
    gate.opened.set()
    closing.join(PATIENCE)
    assert not closing.is_alive() and job.status == "cancelled"
    assert 2 in saved(engine, tmp_path) and len(threads) == 1
