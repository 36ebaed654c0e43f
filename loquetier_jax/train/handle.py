"""A fine-tuning job as its owner sees it: progress, publish, pause, checkpoint, migrate."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from loquetier_jax.adapters.peft import write_peft
from loquetier_jax.adapters.version import Version
from loquetier_jax.arguments import path_of
from loquetier_jax.driver import Driver
from loquetier_jax.errors import CheckpointError, JobError, short
from loquetier_jax.train.data import Dataset
from loquetier_jax.train.device_job import DeviceJob
from loquetier_jax.train.home import JobHome
from loquetier_jax.train.job_state import JobState


@runtime_checkable
class JobTaker(Protocol):
    """What a job can move to: an `Engine`."""

    driver: Driver

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

        Between two packs, even in the middle of gradient accumulation. The job rests until it is written, nobody else
        does; a save of it that is being written comes first.

        Raises:
            JobError: the job has failed, was cancelled or forgotten.
            CheckpointError: not a path.
        """
        path = path_of(path, "path", "the folder to write", CheckpointError)
        store = self._home.saver.store(path, keep=self.device_job.job.cfg.save_total_limit)
        with self._still() as state:
            return store.save(state.arrays, state.host)

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
        with self._still() as state:
            if job.finished:
                raise JobError(f"job {self.name!r}: cannot migrate: it is {job.status}")
            moved = other.adopt_job(state, self.data, self.eval_data, job.cfg.loss)
            with self._home.driver.lock:
                if not job.finished:
                    job.cancel()
            return moved

    @contextmanager
    def _still(self) -> Iterator[JobState]:
        """The job's state on the host, taken between two packs; the job rests until the end of the block.

        Nobody's lock is held in the block: others go on, and jobs may move in opposite directions at once.

        Raises:
            JobError: it has failed, was cancelled or forgotten.
            OSError: the disk does not take its metrics.
        """
        home, device_job = self._home, self.device_job
        self._check_kept()
        home.hash_for_saving(self.data, self.eval_data)
        with home.driver.entered():
            self._check_goes_on()
            home.saver.hold(device_job)
        try:
            state = self._take_state()
            try:
                state.fetch()
                device_job.job.record.sync()
                yield state
            finally:
                with home.driver.lock:
                    home.saver.end(device_job)
        finally:  # also after a Ctrl-C while waiting
            with home.driver.lock:
                home.saver.let_go(device_job)
            home.driver.notify()

    def _take_state(self) -> JobState:
        """The job's state, once nothing of it is on its way; the caller has it rest."""
        home, device_job = self._home, self.device_job

        def still() -> bool:
            return device_job.saving is None and not home.runner.busy(self.name)

        while True:
            home.driver.wait(still)
            with home.driver.lock:
                self._check_kept()
                self._check_goes_on()
                if still():  # nobody was quicker
                    return home.saver.begin(device_job)

    def _check_goes_on(self) -> None:
        if self.status in ("failed", "cancelled"):
            raise JobError(f"job {self.name!r}: it is {self.status}")
