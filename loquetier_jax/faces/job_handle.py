"""A fine-tuning job as its owner sees it: progress, publish, pause, checkpoint, migrate."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loquetier_jax.adapters.peft import write_peft
from loquetier_jax.adapters.version import Version
from loquetier_jax.errors import CheckpointError, JobError, short
from loquetier_jax.faces.arguments import path_of
from loquetier_jax.jobs.checkpoint import CheckpointStore
from loquetier_jax.jobs.data import Dataset
from loquetier_jax.runtime.job_state import JobState, take_job_state
from loquetier_jax.runtime.trainee import Trainee

if TYPE_CHECKING:
    from loquetier_jax.engine import Engine


class JobHandle:
    """A fine-tuning job as its owner sees it; `Engine.finetune` returns one."""

    def __init__(self, engine: "Engine", trainee: Trainee) -> None:
        self._engine, self._trainee = engine, trainee

    def __repr__(self) -> str:
        return f"<JobHandle {self.name!r}: {self.status}, step {self.step} of {self.total_steps}>"

    @property
    def name(self) -> str:
        """Of the job and of the adapter it trains."""
        return self._trainee.name

    @property
    def status(self) -> str:
        """queued, running, paused, succeeded, failed or cancelled."""
        return self._trainee.job.status

    @property
    def error(self) -> str | None:
        """Why it failed."""
        return self._trainee.job.error

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._trainee.job.step

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole job, unless it stops early."""
        return self._trainee.job.total_steps

    @property
    def data(self) -> Dataset:
        """What it trains on; num_truncated, num_dropped and num_empty say what of the data is not in it."""
        return self._trainee.job.stream.data

    @property
    def eval_data(self) -> Dataset | None:
        """What it is evaluated on, likewise."""
        evaluation = self._trainee.job.evaluation
        return None if evaluation is None else evaluation.data

    @property
    def best_step(self) -> int | None:
        """Steps before the evaluation with the lowest loss; its weights are the result with load_best_model_at_end."""
        return self._trainee.job.best_step

    @property
    def serves_best(self) -> bool:
        """Whether it has succeeded with other weights than its last ones, those of `best_step`."""
        return self.status == "succeeded" and self._trainee.serves_best

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl since it started or was resumed: loss, grad_norm, eval_loss, ..."""
        return list(self._trainee.job.record.lines)

    def wait(self) -> "JobHandle":
        """Drives the engine until the job has ended and has left the device: the process may end right after.

        Raises:
            JobError: it failed, or it is paused.
        """
        job = self._trainee.job
        self._engine.wait(lambda: (job.finished and self.released) or job.status == "paused")
        self.settle()
        if job.status == "failed":
            raise JobError(f"job {self.name!r} failed: {job.error}")
        if not job.finished:
            raise JobError(f"job {self.name!r} is {job.status}: resume() it first")
        return self

    def settle(self) -> None:
        """Returns once what the device had of an ended job is on the host; at once while it has not ended."""
        self._trainee.settle()

    @property
    def released(self) -> bool:
        """Whether it has ended and given its pages back."""
        return self._engine.loop.training.trainees.get(self.name) is not self._trainee

    def pause(self) -> None:
        """No further pack is dispatched; raises JobError when it is not queued or running."""
        with self._engine._lock:
            self._trainee.job.pause()

    def resume(self) -> None:
        """Goes on; raises JobError when it is not paused."""
        with self._engine._lock:
            self._trainee.job.resume()

    def cancel(self) -> None:
        """Ends the job; what it published stays, a name that came with it and got nothing is free again.

        Raises JobError when it has ended.
        """
        with self._engine._lock:
            self._trainee.job.cancel()

    def forget(self) -> None:
        """Takes the ended job off `Engine.jobs` and frees the weights and the optimizer state that are kept of it.

        What it published goes on serving. The handle still tells how the job went; `save` and `checkpoint` are refused.

        Raises:
            JobError: the job has not ended.
        """
        engine, trainee, job = self._engine, self._trainee, self._trainee.job
        if not job.finished:
            raise JobError(f"job {self.name!r}: cannot be forgotten: it is {job.status}; cancel() it first")
        engine.wait(lambda: self.released)
        with engine._lock:
            if trainee.latest in engine.adapters.versions():
                engine.adapters.weights(trainee.latest)  # its own from here on
            if engine.jobs.get(self.name) is self:
                del engine.jobs[self.name]
        trainee.forget()

    def _check_kept(self) -> None:
        if self._trainee.master is None:
            raise JobError(f"job {self.name!r}: its weights were freed by forget()")

    def publish(self) -> Version:
        """Makes the present weights serve the next request under the job's name; copies nothing.

        Raises:
            JobError: the job has not started, or has ended (a job that succeeds publishes by itself).
        """
        engine, trainee = self._engine, self._trainee
        with engine._lock:
            if trainee.job.finished or not trainee.pages:
                raise JobError(f"job {self.name!r}: cannot publish: it is {trainee.job.status}")
            return engine.loop.training.publish(trainee, engine.loop.epoch)

    def save(self, path: str | Path) -> Path:
        """Writes the present weights as a PEFT folder; of a job that has succeeded, those that it serves.

        Raises JobError when it was forgotten.
        """
        path = path_of(path, "path", "the folder to write", JobError)
        self._check_kept()
        trainee, engine = self._trainee, self._engine
        with engine._lock:
            weights = trainee.result()
        write_peft(
            path,
            weights,
            trainee.shape,
            engine.spec,
            config=trainee.lora,
            base_model_name_or_path=engine.name or None,
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
        store = CheckpointStore(path, keep=self._trainee.job.cfg.save_total_limit)
        return self._still(lambda state: store.save(state.arrays, state.host))

    def migrate(self, other: "Engine") -> "JobHandle":
        """Moves the job to another engine of the same base: adapter, optimizer, accumulators, cursor, RNG.

        Here it ends as cancelled; there it goes on, bit for bit.

        Raises:
            JobError: it has ended, `other` is none, is this engine or has a job of that name.
            CheckpointError: another base.
        """
        if not isinstance(other, type(self._engine)):
            raise JobError(f"other: got {short(other, 200)}, expected another Engine")
        if other is self._engine:
            raise JobError(f"job {self.name!r}: cannot migrate to the engine it is on")
        job = self._trainee.job

        def move(state: JobState) -> "JobHandle":
            if job.finished:
                raise JobError(f"job {self.name!r}: cannot migrate: it is {job.status}")
            data = job.stream.data, None if job.evaluation is None else job.evaluation.data
            moved = other._adopt(state, *data, self._trainee.job.cfg.loss)
            job.cancel()
            return moved

        return self._still(move, other)

    def _still(self, act: Callable[[JobState], Any], *others: "Engine") -> Any:
        """Calls `act` with the job's state while nothing of it is on its way; goes on afterwards as before.

        The locks of this engine and of `others` are held meanwhile, taken in one order by everybody: of two jobs that
        move in opposite directions at once, neither waits for what the other one has.
        """
        engine, job = self._engine, self._trainee.job
        self._check_kept()
        with engine._entered():
            if job.status in ("failed", "cancelled"):
                raise JobError(f"job {self.name!r}: it is {job.status}")
            held = job.status in ("queued", "running")
            if held:
                job.pause()
        try:
            engine.wait(lambda: not engine.loop.training.busy(job.name))
            with ExitStack() as locks:
                for one in sorted((engine, *others), key=id):
                    locks.enter_context(one._lock)
                state = take_job_state(engine, self._trainee)
                if held and job.status == "paused":  # for this moment only: whoever takes it up goes on
                    state.host["job"]["status"] = job.paused_from
                return act(state)
        finally:  # also after a Ctrl-C while waiting
            with engine._lock:
                if held and job.status == "paused":
                    job.resume()
