"""The calls about fine-tuning jobs, and the handle of one."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from loquetier_jax.adapters.lora import LoraConfig, init_weights, resolve_shape
from loquetier_jax.adapters.peft import write_peft
from loquetier_jax.adapters.store import AdapterStore
from loquetier_jax.adapters.version import Version
from loquetier_jax.config import EngineConfig
from loquetier_jax.errors import AdapterError, JobError
from loquetier_jax.jobs.checkpoint import CheckpointStore, find_checkpoint
from loquetier_jax.jobs.config import TrainConfig
from loquetier_jax.jobs.data import Data, load_dataset
from loquetier_jax.jobs.fingerprint import base_fingerprint
from loquetier_jax.jobs.job import Job
from loquetier_jax.jobs.metrics import MetricsWriter
from loquetier_jax.jobs.optimizer import init_state
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.runtime.job_state import JobState, read_job_state, take_job_state
from loquetier_jax.runtime.loop import Loop
from loquetier_jax.runtime.trainee import Trainee
from loquetier_jax.step.state import DeviceState

if TYPE_CHECKING:
    from loquetier_jax.engine import Engine

CHECKPOINTS = "checkpoints"  # below a job's output_dir


class JobHandle:
    """A fine-tuning job as its owner sees it; `Engine.finetune` returns one."""

    def __init__(self, engine: "Engine", trainee: Trainee) -> None:
        self._engine, self._trainee = engine, trainee

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
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl so far: loss, grad_norm, learning_rate, eval_loss, ..."""
        return list(self._trainee.job.record.lines)

    def wait(self) -> "JobHandle":
        """Drives the engine until the job has ended.

        Raises:
            JobError: it failed, or it is paused.
        """
        job = self._trainee.job
        self._engine.wait(lambda: (job.finished and self._retired) or job.status == "paused")
        if not job.finished or job.status == "failed":
            raise JobError(f"job {self.name!r} is {job.status}: {job.error or 'resume() it first'}")
        return self

    @property
    def _retired(self) -> bool:
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
        """Ends the job; what it published stays. Raises JobError when it has ended."""
        with self._engine._lock:
            self._trainee.job.cancel()

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
        """Writes the present weights as a PEFT folder."""
        trainee, engine = self._trainee, self._engine
        with engine._lock:
            weights = trainee.host_weights()
        write_peft(
            path,
            weights,
            trainee.shape,
            engine.spec,
            config=trainee.lora,
            base_model_name_or_path=engine.name or None,
        )
        return Path(path)

    def checkpoint(self, path: str | Path) -> Path:
        """Writes all that the job needs to go on with the identical next loss; see `Engine.resume_job`.

        Between two packs, even in the middle of gradient accumulation.

        Raises:
            JobError: the job has failed or was cancelled.
        """
        state = self._still(lambda: take_job_state(self._engine, self._trainee))
        return CheckpointStore(path, keep=self._trainee.job.cfg.save_total_limit).save(
            state.arrays, state.host
        )

    def migrate(self, other: "Engine") -> "JobHandle":
        """Moves the job to another engine of the same base: adapter, optimizer, accumulators, cursor, RNG.

        Here it ends as cancelled; there it goes on, bit for bit.

        Raises:
            JobError: it has ended, `other` is this engine or has a job of that name.
            CheckpointError: another base.
        """
        if other is self._engine:
            raise JobError(f"job {self.name!r}: cannot migrate to the engine it is on")
        job = self._trainee.job

        def move() -> "JobHandle":
            state = take_job_state(self._engine, self._trainee)
            data = job.stream.data, None if job.evaluation is None else job.evaluation.data
            moved = other._adopt(state, *data, self._trainee.job.cfg.loss)
            job.cancel()
            return moved

        return self._still(move)

    def _still(self, act: Callable[[], Any]) -> Any:
        """Runs `act` while nothing of this job is on its way; goes on afterwards as before."""
        engine, job = self._engine, self._trainee.job
        with engine._lock:
            if job.status in ("failed", "cancelled"):
                raise JobError(f"job {self.name!r}: it is {job.status}")
            held = job.status in ("queued", "running")
            if held:
                job.pause()
        engine.wait(lambda: not engine.loop.training.busy(job.name))
        with engine._lock:
            try:
                return act()
            finally:
                if held and job.status == "paused":
                    job.resume()


class JobCalls:
    """Part of Engine."""

    spec: DecoderSpec
    cfg: EngineConfig
    state: DeviceState
    tokenizer: PreTrainedTokenizerBase | None
    adapters: AdapterStore
    jobs: dict[str, JobHandle]
    loop: Loop
    wait: Callable[[Callable[[], bool]], None]
    _lock: Any
    _changed: threading.Condition

    def finetune(
        self,
        name: str,
        data: Data,
        *,
        lora: LoraConfig | None = None,
        train: TrainConfig | None = None,
        eval_data: Data | None = None,
        init_from: str | None = None,
        replace: bool = False,
    ) -> JobHandle:
        """Starts training an adapter beside whatever is served; returns once data and settings are checked.

        The name serves at once: the untrained adapter (or `init_from`), then what is published, at the end the
        result.

        Args:
            name: Of the job and the adapter.
            data: JSON-lines file or records; see `jobs.formats`.
            lora: Rank, targets, ...; ignored with `init_from`.
            train: Optimizer, schedule, batch, ...
            eval_data: Held-out data.
            init_from: Adapter whose current version training starts from.
            replace: Whether an adapter of that name may be replaced (implied when init_from is name).

        Raises:
            DataError: a malformed line, with its number.
            AdapterError: the name is taken, nothing to adapt, or a rank too large.
            JobError: a job of that name has not ended.
        """
        cfg = train or TrainConfig()
        with self._lock:
            self._check_job(name)
            lora = lora or LoraConfig()
            if init_from is None:
                shape = resolve_shape(lora, self.spec)
                weights = init_weights(shape, lora, self.spec, cfg.seed)
            else:
                version = self.adapters.get(init_from)
                shape, weights = version.shape, self.adapters.weights(version)
                lora = version.config or lora
            self.adapters.check_new(name, shape, replace=replace or init_from == name)
            if shape.num_pages > self.cfg.train_pages:
                raise AdapterError(
                    f"{name}: got rank {shape.max_rank}, expected <= {16 * self.cfg.train_pages}"
                )
            dataset = load_dataset(data, self.tokenizer, cfg)
            held_out = (
                None if eval_data is None else load_dataset(eval_data, self.tokenizer, cfg, name="eval_data")
            )
            job = Job(name, cfg, dataset, held_out, metrics=_metrics(cfg))
            if name not in self.adapters:
                self.adapters.add(name, weights, shape, config=lora)
            master, opt_state = init_state(weights, cfg.optim)
            return self._enlist(Trainee(job, lora, shape, master, opt_state))

    def resume_job(
        self,
        path: str | Path,
        data: Data,
        *,
        eval_data: Data | None = None,
        loss: Callable[..., Any] | None = None,
    ) -> JobHandle:
        """Goes on with a checkpointed job: the next losses are those it would have had.

        Args:
            path: A checkpoint, or the folder of several (the newest counts), or a job's output_dir.
            data, eval_data: The same data as before; hashes are compared.
            loss: The loss function, if the job had one of its own.

        Raises:
            CheckpointError: no committed checkpoint, another base, other data.
        """
        path = Path(path)
        if (path / CHECKPOINTS).is_dir():
            path = path / CHECKPOINTS
        state = read_job_state(self.spec, find_checkpoint(path))
        cfg = TrainConfig.from_dict(state.host["job"]["config"], loss=loss)
        with self._lock:
            dataset = load_dataset(data, self.tokenizer, cfg)
            held_out = (
                None if eval_data is None else load_dataset(eval_data, self.tokenizer, cfg, name="eval_data")
            )
            return self._adopt(state, dataset, held_out, loss)

    def _adopt(self, state: JobState, data: Any, eval_data: Any, loss: Any) -> JobHandle:
        """A job from its state, here."""
        with self._lock:
            self._check_job(state.host["job"]["name"])
            state.check_base(base_fingerprint(self.spec, self.state.params))
            cfg = TrainConfig.from_dict(state.host["job"]["config"], loss=loss if callable(loss) else None)
            job = Job.from_state(
                state.host["job"],
                data,
                eval_data,
                metrics=_metrics(cfg),
                loss=loss if callable(loss) else None,
            )
            arrays = jax.tree.map(jax.numpy.asarray, (state.arrays["master"], state.arrays["opt_state"]))
            trainee = Trainee(job, state.lora, state.shape, *arrays, grads=state.arrays["grads"])
            if job.name not in self.adapters:
                self.adapters.add(job.name, state.arrays["master"], state.shape, config=state.lora)
            return self._enlist(trainee)

    def _check_job(self, name: str) -> None:
        if name in self.jobs and name in self.loop.training.trainees:
            raise JobError(f"job {name!r} has not ended: it is {self.jobs[name].status}")

    def _enlist(self, trainee: Trainee) -> JobHandle:
        self.loop.training.add(trainee)
        handle = self.jobs[trainee.name] = JobHandle(self, trainee)
        self._changed.notify_all()
        return handle

    def _job_stepped(self, trainee: Trainee) -> None:
        """After an optimizer step or an evaluation: checkpoints that are due."""
        job = trainee.job
        if job.save_due and not self.loop.training.busy(job.name):
            state = take_job_state(self, trainee)
            folder = Path(job.cfg.output_dir) / CHECKPOINTS
            CheckpointStore(folder, keep=job.cfg.save_total_limit).save(state.arrays, state.host)
            job.saved()

    def _job_ended(self, trainee: Trainee) -> None:
        """A job that succeeded serves its result under its name; its masters go to the host."""
        if trainee.job.status == "succeeded":
            self.loop.training.publish(trainee, self.loop.epoch, fresh=False)
        trainee.master = trainee.host_weights()
        trainee.opt_state = jax.tree.map(np.asarray, trainee.opt_state)
        self._changed.notify_all()


def _metrics(cfg: TrainConfig) -> MetricsWriter | None:
    return None if cfg.output_dir is None else MetricsWriter(Path(cfg.output_dir) / "metrics.jsonl")
