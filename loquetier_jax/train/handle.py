"""A fine-tuning job as its owner sees it: progress, publish, pause, checkpoint, migrate."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from loquetier_jax.adapters.peft import write_peft
from loquetier_jax.adapters.version import Version
from loquetier_jax.arguments import path_of
from loquetier_jax.driver import Driver
from loquetier_jax.errors import CheckpointError, JobError, short
from loquetier_jax.train.checkpoint import CheckpointStore
from loquetier_jax.train.data import Dataset
from loquetier_jax.train.device_job import DeviceJob
from loquetier_jax.train.home import JobHome
from loquetier_jax.train.job_state import JobState


@runtime_checkable
class JobTaker(Protocol):
    """What a job can move to: an `Engine`."""

    driver: Driver

    def release_ended(self, name: str) -> None:
        """Waits, where a job of that name has ended, until it has given everything on the device back."""

    def adopt_job(self, state: JobState, data: Dataset, eval_data: Dataset | None, loss: Any) -> "JobHandle":
        """A job from its state."""


class JobHandle:
    """A fine-tuning job as its owner sees it; `Engine.finetune` returns one."""

    def __init__(self, home: JobHome, device_job: DeviceJob) -> None:
        self._home, self.device_job = home, device_job

    def __repr__(self) -> str:
        return f"<JobHandle {self.name!r}: {self.status}, step {self.step} of {self.total_steps}>"

    @property
    def name(self) -> str:
        """Of the job and of the adapter it trains."""
        return self.device_job.name

    @property
    def status(self) -> str:
        """queued, running, paused, succeeded, failed or cancelled."""
        return self.device_job.job.status

    @property
    def error(self) -> str | None:
        """Why it failed."""
        return self.device_job.job.error

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.device_job.job.step

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole job, unless it stops early."""
        return self.device_job.job.total_steps

    @property
    def data(self) -> Dataset:
        """What it trains on; num_truncated, num_dropped and num_empty say what of the data is not in it."""
        return self.device_job.job.stream.data

    @property
    def eval_data(self) -> Dataset | None:
        """What it is evaluated on, likewise."""
        evaluation = self.device_job.job.evaluation
        return None if evaluation is None else evaluation.data

    @property
    def output_dir(self) -> Path | None:
        """Where its metrics.jsonl and checkpoints/ are; None when it writes none."""
        folder = self.device_job.job.cfg.output_dir
        return None if folder is None else Path(folder)

    @property
    def best_step(self) -> int | None:
        """Steps before the evaluation with the lowest loss; its weights are the result with load_best_model_at_end."""
        return self.device_job.job.best_step

    @property
    def serves_best(self) -> bool:
        """Whether it has succeeded with other weights than its last ones, those of `best_step`."""
        return self.status == "succeeded" and self.device_job.serves_best

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl since it started or was resumed: loss, grad_norm, eval_loss, ..."""
        return list(self.device_job.job.record.lines)

    def wait(self) -> "JobHandle":
        """Drives the engine until the job has ended and has left the device: the process may end right after.

        Raises:
            JobError: it failed, or it is paused.
        """
        job = self.device_job.job
        self._home.driver.wait(lambda: (job.finished and self.released) or job.status == "paused")
        self.settle()
        if job.status == "failed":
            raise JobError(f"job {self.name!r} failed: {job.error}")
        if not job.finished:
            raise JobError(f"job {self.name!r} is {job.status}: resume() it first")
        return self

    def settle(self) -> None:
        """Returns once what the device had of an ended job is on the host; at once while it has not ended."""
        self.device_job.settle()

    @property
    def released(self) -> bool:
        """Whether it has ended and given its pages back."""
        return self._home.runner.device_jobs.get(self.name) is not self.device_job

    def pause(self) -> None:
        """No further pack is dispatched; raises JobError when it is not queued or running."""
        with self._home.driver.entered():
            self.device_job.job.pause()

    def resume(self) -> None:
        """Goes on; raises JobError when it is not paused."""
        with self._home.driver.entered():
            self.device_job.job.resume()

    def cancel(self) -> None:
        """Ends the job; what it published stays, a name that came with it and got nothing is free again.

        Raises JobError when it has ended.
        """
        with self._home.driver.entered():
            self.device_job.job.cancel()

    def forget(self) -> None:
        """Takes the ended job off `Engine.jobs` and frees the weights and the optimizer state that are kept of it.

        What it published goes on serving. The handle still tells how the job went; `save` and `checkpoint` are refused.

        Raises:
            JobError: the job has not ended.
        """
        home, device_job, job = self._home, self.device_job, self.device_job.job
        if not job.finished:
            raise JobError(f"job {self.name!r}: cannot be forgotten: it is {job.status}; cancel() it first")
        home.driver.wait(lambda: self.released)
        with home.driver.lock:
            if device_job.latest in home.store.versions():
                home.store.weights(device_job.latest)  # its own from here on
            if home.jobs.get(self.name) is self:
                del home.jobs[self.name]
        device_job.forget()

    def _check_kept(self) -> None:
        if self.device_job.master is None:
            raise JobError(f"job {self.name!r}: its weights were freed by forget()")

    def publish(self) -> Version:
        """Makes the present weights serve the next request under the job's name; copies nothing.

        Raises:
            JobError: the job has not started, or has ended (a job that succeeds publishes by itself).
        """
        home, device_job = self._home, self.device_job
        with home.driver.entered():
            if device_job.job.finished or not device_job.pages:
                raise JobError(f"job {self.name!r}: cannot publish: it is {device_job.job.status}")
            return home.runner.publish(device_job, home.epoch())

    def save(self, path: str | Path) -> Path:
        """Writes the present weights as a PEFT folder; of a job that has succeeded, those that it serves.

        Raises JobError when it was forgotten.
        """
        path = path_of(path, "path", "the folder to write", JobError)
        self._check_kept()
        device_job, home = self.device_job, self._home
        with home.driver.lock:
            weights = device_job.result()
        write_peft(
            path,
            weights,
            device_job.shape,
            home.spec,
            config=device_job.lora,
            base_model_name_or_path=home.base or None,
        )
        return path

    def checkpoint(self, path: str | Path) -> Path:
        """Writes all that the job needs to go on with the identical next loss; see `Engine.resume_job`.

        Between two packs, even in the middle of gradient accumulation.

        Raises:
            JobError: the job has failed, was cancelled or forgotten.
            CheckpointError: not a path.
        """
        path = path_of(path, "path", "the folder to write", CheckpointError)
        store = CheckpointStore(path, keep=self.device_job.job.cfg.save_total_limit)
        return self._still(lambda state: store.save(state.arrays, state.host))

    def migrate(self, other: JobTaker) -> "JobHandle":
        """Moves the job to another engine of the same base: adapter, optimizer, accumulators, cursor, RNG.

        Here it ends as cancelled; there it goes on, bit for bit.

        Args:
            other: The engine.

        Raises:
            JobError: it has ended, `other` is no engine, is this engine or has a job of that name.
            CheckpointError: another base.
        """
        if not isinstance(other, JobTaker):
            raise JobError(f"other: got {short(other, 200)}, expected another Engine")
        if other.driver is self._home.driver:
            raise JobError(f"job {self.name!r}: cannot migrate to the engine it is on")
        job = self.device_job.job

        def move(state: JobState) -> "JobHandle":
            if job.finished:
                raise JobError(f"job {self.name!r}: cannot migrate: it is {job.status}")
            data = job.stream.data, None if job.evaluation is None else job.evaluation.data
            moved = other.adopt_job(state, *data, job.cfg.loss)
            job.cancel()
            return moved

        other.release_ended(self.name)
        return self._still(move, other.driver)

    def _still(self, act: Callable[[JobState], Any], *others: Driver) -> Any:
        """Calls `act` with the job's state while nothing of it is on its way; goes on afterwards as before.

        The locks of this engine and of `others` are held meanwhile, taken in one order by everybody: of two jobs that
        move in opposite directions at once, neither waits for what the other one has.
        """
        home, job = self._home, self.device_job.job
        self._check_kept()
        with home.driver.entered():
            if job.status in ("failed", "cancelled"):
                raise JobError(f"job {self.name!r}: it is {job.status}")
            held = job.status in ("queued", "running")
            if held:
                job.pause()
        try:
            home.driver.wait(lambda: not home.runner.busy(job.name))
            with ExitStack() as locks:
                for one in sorted((home.driver, *others), key=id):
                    locks.enter_context(one.lock)
                state = home.take_state(self.device_job)
                if held and job.status == "paused":  # for this moment only: whoever takes it up goes on
                    state.host["job"]["status"] = job.paused_from
                return act(state)
        finally:  # also after a Ctrl-C while waiting
            with home.driver.lock:
                if held and job.status == "paused":
                    job.resume()
