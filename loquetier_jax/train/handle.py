"""The handle of a fine-tuning job: progress, publish, pause, checkpoint, migrate."""

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
    """A migration target: an `Engine`."""

    driver: Driver

    def adopt_job(self, state: JobState, data: Dataset, eval_data: Dataset | None, loss: Any) -> "JobHandle":
        """Creates a job from its state."""


class JobHandle:
    """Controls and observes a fine-tuning job; returned by `Engine.finetune`."""

    def __init__(self, home: JobHome, device_job: DeviceJob) -> None:
        self._home, self.device_job = home, device_job

    def __repr__(self) -> str:
        return f"<JobHandle {self.name!r}: {self.status}, step {self.step} of {self.total_steps}>"

    @property
    def name(self) -> str:
        """The name of the job and of the adapter it trains."""
        return self.device_job.name

    @property
    def status(self) -> str:
        """queued, running, paused, succeeded, failed or cancelled."""
        return self.device_job.job.status

    @property
    def error(self) -> str | None:
        """Why it failed; None otherwise."""
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
        """The training data; num_truncated, num_dropped and num_empty count what was cut or left out."""
        return self.device_job.job.stream.data

    @property
    def eval_data(self) -> Dataset | None:
        """The evaluation data, likewise; None without evaluation."""
        evaluation = self.device_job.job.evaluation
        return None if evaluation is None else evaluation.data

    @property
    def output_dir(self) -> Path | None:
        """The folder of its metrics.jsonl and checkpoints/; None when it writes none."""
        folder = self.device_job.job.cfg.output_dir
        return None if folder is None else Path(folder)

    @property
    def best_step(self) -> int | None:
        """The step with the lowest evaluation loss; with load_best_model_at_end, its weights are the result."""
        return self.device_job.job.best_step

    @property
    def serves_best(self) -> bool:
        """Whether it succeeded and serves the weights of `best_step` instead of its last ones."""
        return self.status == "succeeded" and self.device_job.serves_best

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The metrics.jsonl lines since it was started or resumed: loss, grad_norm, eval_loss, ..."""
        return list(self.device_job.job.record.lines)

    def wait(self) -> "JobHandle":
        """Drives the engine until the job has ended and left the device; the process may exit right after.

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
        """Returns once the data of an ended job has been copied to the host; at once if the job has not ended."""
        self.device_job.settle()

    @property
    def released(self) -> bool:
        """Whether it has ended and returned its pages."""
        return self._home.runner.device_jobs.get(self.name) is not self.device_job

    def pause(self) -> None:
        """Stops dispatching packs; raises JobError unless it is queued or running."""
        with self._home.driver.entered():
            self.device_job.job.pause()

    def resume(self) -> None:
        """Continues a paused job; raises JobError unless it is paused."""
        with self._home.driver.entered():
            self.device_job.job.resume()

    def cancel(self) -> None:
        """Ends the job. Published weights stay; if the job added its name and published nothing, the name is freed.

        Raises JobError if it has already ended.
        """
        with self._home.driver.entered():
            self.device_job.job.cancel()

    def forget(self) -> None:
        """Removes the ended job from `Engine.jobs` and frees its weights and optimizer state.

        Published weights keep serving. The handle still reports results; `save` and `checkpoint` are refused.

        Raises:
            JobError: the job has not ended.
        """
        home, device_job, job = self._home, self.device_job, self.device_job.job
        if not job.finished:
            raise JobError(f"job {self.name!r}: cannot be forgotten: it is {job.status}; cancel() it first")
        home.driver.wait(lambda: self.released)
        with home.driver.lock:
            if device_job.latest in home.store.versions():
                home.store.weights(device_job.latest)  # its own copy from now on
            if home.jobs.get(self.name) is self:
                del home.jobs[self.name]
        device_job.forget()

    def _check_kept(self) -> None:
        if self.device_job.master is None:
            raise JobError(f"job {self.name!r}: its weights were freed by forget()")

    def publish(self) -> Version:
        """Serves the current weights under the job's name from the next request on; copies nothing.

        Raises:
            JobError: the job has not started, or has ended (a job that succeeds publishes its result automatically).
        """
        home, device_job = self._home, self.device_job
        with home.driver.entered():
            if device_job.job.finished or not device_job.pages:
                raise JobError(f"job {self.name!r}: cannot publish: it is {device_job.job.status}")
            return home.runner.publish(device_job, home.epoch())

    def save(self, path: str | Path) -> Path:
        """Writes the current weights as a PEFT folder; after success, the weights that it serves.

        Raises JobError after `forget`.
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
        """Writes everything needed to continue with identical losses; see `Engine.resume_job`.

        Taken between two packs, even in the middle of gradient accumulation, and after any save under way. Until it is
        written, the job pauses; requests and other jobs continue.

        Raises:
            JobError: the job failed, was cancelled or forgotten.
            CheckpointError: not a path.
        """
        path = path_of(path, "path", "the folder to write", CheckpointError)
        store = self._home.saver.store(path, keep=self.device_job.job.cfg.save_total_limit)
        with self._still() as state:
            return store.save(state.arrays, state.host)

    def migrate(self, other: JobTaker) -> "JobHandle":
        """Moves the job to another engine with the same base: adapter, optimizer, accumulators, cursor, RNG.

        Here it ends as cancelled; there it continues, bit for bit.

        Args:
            other: The target engine.

        Raises:
            JobError: the job has ended, or `other` is not an engine, is this engine, or has a job of that name.
            CheckpointError: `other` has another base.
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
        """The job's state on the host, taken between two packs; the job pauses until the end of the block.

        No lock is held in the block: other work continues, and jobs may migrate in opposite directions at once.

        Raises:
            JobError: it failed, was cancelled or forgotten.
            OSError: its metrics cannot be written.
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
        """The job's state, once none of its work is in flight; the caller holds the job."""
        home, device_job = self._home, self.device_job

        def still() -> bool:
            return device_job.saving is None and (self.released or not home.runner.busy(self.name))

        while True:
            home.driver.wait(still)
            with home.driver.lock:
                self._check_kept()
                self._check_goes_on()
                if still():  # checked again: another thread may have started a save
                    return home.saver.begin(device_job)

    def _check_goes_on(self) -> None:
        if self.status in ("failed", "cancelled"):
            raise JobError(f"job {self.name!r}: it is {self.status}")
