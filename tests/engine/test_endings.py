"""What ends, ends: jobs that leave nothing behind, and engines that are closed or dropped."""

import gc
import threading
import weakref
from contextlib import suppress
from typing import Any

import jax
import pytest

from loquetier_jax.driver import LoopThread
from loquetier_jax.errors import EngineError, JobError
from loquetier_jax.train.device_job import DeviceJob
from tests.engine.engines import greedy, random_data
from tests.engine.evidence import LORA, quick


def device_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.parametrize("end", ["succeeded", "cancelled", "failed"])
def test_an_ended_job_holds_nothing_on_the_device(tiny_engine: Any, end: str):
    """Masters and moments of every job that had ever run stayed for as long as the engine."""
    engine, before = tiny_engine, device_bytes()
    changes = {"learning_rate": 1e30, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"} if end == "failed" else {}
    job = engine.finetune("job", random_data(0), lora=LORA, train=quick(**changes))
    if end == "cancelled":
        engine.wait(lambda: job.step >= 1)
        job.cancel()
    with suppress(JobError):
        job.wait()
    assert job.status == end
    assert device_bytes() == before
    engine.drain()


def test_wait_returns_when_the_copy_to_the_host_has_ended(tiny_engine: Any, monkeypatch: pytest.MonkeyPatch):
    """A daemon thread copied on; an interpreter that ended meanwhile was aborted."""
    daemons, leave = [], DeviceJob.leave_device

    def watched(device_job: DeviceJob) -> None:
        leave(device_job)
        daemons.append(threading.current_thread().daemon)

    monkeypatch.setattr(DeviceJob, "leave_device", watched)
    tiny_engine.finetune("job", random_data(0), lora=LORA, train=quick()).wait()
    assert daemons == [False]


def test_a_forgotten_job_is_gone_and_its_adapter_serves(tiny_engine: Any, tmp_path: Any):
    engine = tiny_engine
    job = engine.finetune("job", random_data(0), lora=LORA, train=quick())
    with pytest.raises(JobError, match=r"cannot be forgotten: it is (queued|running); cancel\(\) it first"):
        engine.forget_job("job")
    [before] = engine.log_probs([[5, 6, 7, 8]], job.wait().name)
    engine.forget_job("job")
    assert "job" not in engine.jobs and (job.status, job.step) == ("succeeded", 3)
    for call in (job.save, job.checkpoint):
        with pytest.raises(JobError, match="were freed by forget"):
            call(tmp_path / "folder")
    with pytest.raises(JobError, match=r"name: got 'job', expected one of the jobs: \[\]"):
        engine.forget_job("job")
    [after] = engine.log_probs([[5, 6, 7, 8]], "job")
    assert after.tobytes() == before.tobytes()
    engine.save_adapter("job", tmp_path / "adapter")
    assert engine.generate([[5, 6, 7]], "job", greedy(2))[0].outputs[0].finish_reason == "length"
    engine.check_integrity()


def test_a_closed_engine_refuses_in_a_plain_sentence(make_engine: Any, tmp_path: Any):
    before = device_bytes()
    with make_engine() as engine:
        other = make_engine()
        done = engine.finetune("done", random_data(0), lora=LORA, train=quick()).wait()
        job = engine.finetune("job", random_data(0), lora=LORA, train=quick(max_steps=50))
        engine.wait(lambda: job.step >= 1)
        running = engine.submit([5, 6, 7], params=greedy(100))
        assert repr(job) == f"<JobHandle 'job': running, step {job.step} of 50>"
        assert repr(engine) == "<Engine '': 2 adapters, 1 jobs under way, 1 requests>"
        engine.start()
    assert not any(isinstance(thread, LoopThread) for thread in threading.enumerate())
    assert (job.status, done.status) == ("cancelled", "succeeded")
    assert running.requests[0].stop_reason == "the engine was closed"
    calls = (
        lambda: engine.submit([5]),
        lambda: engine.generate([[5]]),
        lambda: engine.log_probs([[5, 6]]),
        lambda: engine.finetune("new", random_data(0)),
        lambda: engine.load_adapter("a", done.save(tmp_path / "adapter")),
        lambda: engine.save_adapter("done", tmp_path / "other"),
        lambda: engine.unload_adapter("done"),
        lambda: done.checkpoint(tmp_path / "checkpoint"),
        lambda: other.finetune("moved", random_data(0), lora=LORA, train=quick()).migrate(engine),
        engine.step,
        engine.start,
        engine.drain,
        engine.check_integrity,
    )
    for call in calls:
        with pytest.raises(EngineError, match="engine: already closed; create a new one"):
            call()
    assert repr(engine) == "<Engine '': closed>"
    assert not engine.cancel("request-0")
    engine.stop()
    engine.close()
    other.close()
    assert device_bytes() == before, "both have let everything go, though they are still there"


def test_a_started_engine_that_is_dropped_is_freed(make_engine: Any):
    """Its thread kept it: a notebook cell that was run twice held two models."""
    engine = make_engine()
    engine.start()
    dropped = weakref.ref(engine)
    del engine
    for _ in range(100):  # the thread holds it during a step, when nothing is collected
        gc.collect()
        if dropped() is None:
            break
    assert dropped() is None
