"""Starts, resumes, migrates and ends fine-tuning jobs."""

import dataclasses
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from loquetier_jax.adapters.lora import LoraConfig, LoraShape, LoraWeights, init_weights, resolve_shape
from loquetier_jax.adapters.manager import current_weights
from loquetier_jax.adapters.registry import check_name
from loquetier_jax.arguments import path_of
from loquetier_jax.config import EngineConfig, require
from loquetier_jax.errors import AdapterError, CheckpointError, JobError, short
from loquetier_jax.serve.tokenizer_type import PreTrainedTokenizerBase
from loquetier_jax.train.changes import changed_config
from loquetier_jax.train.config import TrainConfig
from loquetier_jax.train.data import Data, Dataset, load_dataset
from loquetier_jax.train.data_checks import check_samples
from loquetier_jax.train.device_job import DeviceJob
from loquetier_jax.train.handle import JobHandle
from loquetier_jax.train.home import JobHome
from loquetier_jax.train.job import Job
from loquetier_jax.train.job_state import JobState, read_job_state
from loquetier_jax.train.lifecycle import FINISHED
from loquetier_jax.train.metrics import MetricsWriter
from loquetier_jax.train.optimizer import init_state
from loquetier_jax.train.restore import restore_job
from loquetier_jax.train.resumed import find_resumed
from loquetier_jax.train.run_folder import METRICS


class JobManager:
    """Starts, resumes, migrates and ends jobs. Thread-safe.

    Reading, tokenizing and hashing data, initializing and casting adapters, and hashing the base run in the caller's
    thread, without the loop's lock.

    Args:
        home: The parts of the engine that jobs use; its runner's `on_step` and `on_end` are set here.
        cfg, tokenizer: The engine's.
    """

    def __init__(self, home: JobHome, cfg: EngineConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.home, self.cfg, self.tokenizer = home, cfg, tokenizer
        self.saver = home.saver
        home.runner.on_step, home.runner.on_end = self.saver.save_if_due, self._job_ended

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
        """Starts training an adapter while requests are served; returns once data and settings are checked.

        The name can be requested at once: it serves the untrained adapter (or `init_from`), then each published
        version, finally the result. If the job fails or is cancelled before publishing, a name that it added is freed,
        and requests to it end with that error.

        Args:
            name: The name of the job and the adapter.
            data: A file of JSON lines or of one JSON array, or any iterable of records (a list, a generator, a
                `datasets.Dataset`); see `train.data.load_dataset`. `JobHandle.data` counts what was cut or left out.
            lora: Rank, targets, ...; must be None with `init_from`, whose settings are used.
            train: Optimizer, schedule, batch, ...
            eval_data: Held-out data.
            init_from: Adapter whose current version training starts from.
            replace: Whether an adapter of that name may be replaced (implied if `init_from` equals `name`).

        Raises:
            DataError: a malformed line, with its number; a token id outside the model's vocabulary; extras that the
                loss does not use; a group longer than a pack.
            AdapterError: an invalid name or one in use, nothing to adapt, or a rank too large.
            ConfigError: settings of a wrong type, `lora` together with `init_from`, eval_steps or
                load_best_model_at_end without eval_data.
            JobError: a job of that name has not ended, no score bucket holds its evaluation packs, or the
                output_dir is in use by another job or cannot be written.
        """
        require(lora is None or init_from is None, "lora", lora, f"None: init_from {init_from!r} has its own")
        cfg, lora = train or TrainConfig(), lora or LoraConfig()
        for argument, value, kind in (("train", cfg, TrainConfig), ("lora", lora, LoraConfig)):
            require(isinstance(value, kind), argument, value, f"a loquetier_jax.{kind.__name__}")
        cfg.check_dtype(self.cfg.dtype)
        cfg.check_evaluation(evaluates=eval_data is not None)
        if cfg.pack_tokens is None:
            longest = self.cfg.longest_pack(scored=eval_data is not None) or cfg.pack_rows
            cfg = dataclasses.replace(cfg, pack_tokens=longest)
        own = resolve_shape(lora, self.home.spec) if init_from is None else None
        evaluates, replace = eval_data is not None, replace or init_from == name
        fits = partial(self._check_room, name, cfg=cfg, evaluates=evaluates, replace=replace)
        self._retire_ended(name)
        with self.home.driver.entered():  # checked early: what follows may take minutes and gigabytes
            self._check_job(name)
            fits(shape=own or self.home.store.get(init_from).shape)
        now = datetime.now()
        dataset, held_out = self._read(data, eval_data, cfg, now)
        if cfg.save_steps:
            self.home.hash_for_saving(dataset, held_out)
        shape, weights, lora = self._begin_with(init_from, own, lora, cfg.seed)
        arrays, cast = init_state(weights, cfg.optim), self._cast(weights, shape)
        with self.home.driver.entered():
            self._check_job(name)
            fits(shape=shape)
            began = {"metrics": _metrics(cfg), "tokenized_at": now, "untrained": init_from is None}
            job = Job(name, cfg, dataset, held_out, **began)
            job.tell_left_out()
            return self._enlist(DeviceJob(job, lora, shape, *arrays, cast=cast), weights)

    def resume_job(
        self,
        path: str | Path,
        data: Data,
        *,
        eval_data: Data | None = None,
        loss: Callable[..., Any] | None = None,
        train: Mapping[str, Any] | None = None,
    ) -> JobHandle:
        """Continues a checkpointed job with exactly the losses it would have had without the interruption.

        Args:
            path: A checkpoint, a folder of checkpoints (the newest is used), or a job's output_dir, where the job
                continues to write even if the folder was moved. A checkpoint that is not the newest
                of its job's output_dir (an older one, a copy elsewhere) starts a branch, which writes to a new folder
                beside it, `<output_dir>-branch-1`: the log and `JobHandle.output_dir` name it.
            data, eval_data: The same data as before; hashes are compared.
            loss: The loss function, if the job had its own.
            train: Fields of TrainConfig to change from here on. {"max_steps": 1000} extends a finished run: with
                its optimizer state, and the learning rate of that step of the longer schedule.

        Raises:
            CheckpointError: no committed checkpoint, another base, or other data.
            ConfigError: a field that cannot change during a job (data, packs, optimizer, loss), or no steps left.
            AdapterError, JobError: this engine has no room for it, or a job of its name has not ended.
        """
        path = path_of(path, "path", "a checkpoint or a folder of them", CheckpointError)
        found = find_resumed(path)
        state = read_job_state(self.home.spec, found.checkpoint)
        saved = state.host["job"]
        found.settle_folder(saved)
        saved["config"] = changed_config(saved["config"], train or {})
        cfg = TrainConfig.from_dict(saved["config"], loss=loss)
        if train:
            cfg.check_evaluation(evaluates=eval_data is not None)
        data_sets = self._read(data, eval_data, cfg, datetime.fromisoformat(saved["tokenized_at"]))
        return self.adopt_job(state, *data_sets, loss, go_on=bool(train))

    def forget_job(self, name: str) -> None:
        """Removes an ended job from `jobs` and frees its weights and optimizer state; see `JobHandle.forget`.

        Raises:
            JobError: no job of that name, or it has not ended.
        """
        if name not in self.home.jobs:
            raise JobError(f"name: got {short(name)}, expected one of the jobs: {sorted(self.home.jobs)}")
        self.home.jobs[name].forget()

    def _read(
        self, data: Data, eval_data: Data | None, cfg: TrainConfig, now: datetime
    ) -> tuple[Dataset, Dataset | None]:
        """Reads both data sets, without the lock: tokenizing takes long, and requests continue meanwhile."""
        read = partial(load_dataset, tokenizer=self.tokenizer, cfg=cfg, vocab_size=self.home.spec.vocab_size, now=now)
        own_loss, dataset = callable(cfg.loss), read(data)
        check_samples(dataset, cfg.pack_rows, own_loss=own_loss)
        if eval_data is None:
            return dataset, None
        held_out = read(eval_data, name="eval_data")
        check_samples(held_out, cfg.pack_rows, own_loss=own_loss, like=dataset)
        return dataset, held_out

    def _begin_with(
        self, init_from: str | None, own: LoraShape | None, lora: LoraConfig, seed: int
    ) -> tuple[LoraShape, LoraWeights, LoraConfig]:
        """The initial adapter: the current version of `init_from`, or a fresh one of shape `own`."""
        if own is not None:
            return own, init_weights(own, lora, self.home.spec, seed), lora
        version, weights = current_weights(init_from, self.home.store, self.home.driver)
        return version.shape, weights, version.config or lora

    def _cast(self, weights: LoraWeights, shape: LoraShape) -> Any:
        """The adapter's pages, already on the device: the loop only writes them."""
        return self.home.store.staged(jax.tree.map(np.asarray, weights), shape)

    def adopt_job(
        self, state: JobState, data: Dataset, eval_data: Dataset | None, loss: Any, *, go_on: bool = False
    ) -> JobHandle:
        """Creates a job on this engine from its state; used by `resume_job` and `JobHandle.migrate`.

        Args:
            state: The job's state.
            data, eval_data: Its training and evaluation data; hashes are compared.
            loss: Its loss function, if it has its own.
            go_on: Whether to require remaining steps, even if the job had succeeded.

        Raises:
            CheckpointError, ConfigError, AdapterError, JobError: see `resume_job`.
        """
        loss, saved = loss if callable(loss) else None, state.host["job"]
        self._retire_ended(saved["name"])
        self.home.hash_for_saving(data, eval_data)
        state.check_base(self.home.fingerprint())
        cfg = TrainConfig.from_dict(saved["config"], loss=loss)
        fits = partial(self._check_room, saved["name"], state.shape, cfg, eval_data is not None, replace=True)
        with self.home.driver.entered():
            self._check_job(saved["name"])
            fits()
        master, cast = state.arrays["master"], self._cast(state.arrays["master"], state.shape)
        arrays = jax.tree.map(jnp.asarray, (master, state.arrays["opt_state"]))
        with self.home.driver.entered():
            self._check_job(saved["name"])
            fits()
            job = restore_job(saved, data, eval_data, metrics=_metrics(cfg), loss=loss, go_on=go_on)
            if cfg.keeps_best and not state.host["best"] and job.evaluation is not None:
                job.evaluation.forget_best()  # its weights were not kept
            rest = {"grads": state.grads, "best": state.arrays["best"] or None, "cast": cast}
            return self._enlist(DeviceJob(job, state.lora, state.shape, *arrays, **rest), master)

    def _check_job(self, name: str) -> None:
        self.home.driver.check_alive()
        check_name(name)
        if name in self.home.jobs and name in self.home.runner.device_jobs:
            raise JobError(f"job {name!r} has not ended: it is {self.home.jobs[name].status}")

    def _retire_ended(self, name: str) -> None:
        """If a job of that name has ended, waits until it has returned its pages.

        Raises:
            AdapterError: an invalid name.
            EngineError: a step failed, or the engine was closed.
        """
        self.home.driver.check_alive()
        check_name(name)
        if name in self.home.jobs and self.home.jobs[name].status in FINISHED and name in self.home.runner.device_jobs:
            self.home.driver.wait(lambda: name not in self.home.runner.device_jobs)

    def _check_room(self, name: str, shape: LoraShape, cfg: TrainConfig, evaluates: bool, *, replace: bool) -> None:
        """Refuses a job that would wait forever, or write into another job's folder."""
        others = [t for t in self.home.runner.device_jobs.values() if cfg.output_dir and t.job.cfg.output_dir]
        for other in others:
            if Path(other.job.cfg.output_dir).resolve() == Path(cfg.output_dir).resolve():
                raise JobError(f"output_dir: {str(cfg.output_dir)!r} is in use by job {other.name!r}")
        self.home.store.check_new(name, shape, replace=replace)
        if shape.num_pages > self.cfg.train_pages:
            raise AdapterError(f"{name}: got rank {shape.max_rank}, expected <= {16 * self.cfg.train_pages}")
        longest = max((b.score_tokens for b in self.cfg.buckets), default=0)
        if evaluates and cfg.pack_rows > longest:
            most = f"{longest}, the longest score bucket"
            raise JobError(f"eval_data: got pack_tokens {cfg.pack_rows}, expected <= {most}")

    def _enlist(self, device_job: DeviceJob, weights: LoraWeights) -> JobHandle:
        if device_job.name not in self.home.store:
            settings = weights, device_job.shape
            device_job.placeholder = self.home.store.add(device_job.name, *settings, config=device_job.lora)
        self.home.runner.add(device_job)
        handle = self.home.jobs[device_job.name] = JobHandle(self.home, device_job)
        self.home.driver.notify()
        return handle

    def _job_ended(self, device_job: DeviceJob) -> None:
        """If the job succeeded, serves its result under its name. Moves its state to the host."""
        if device_job.job.status != "succeeded":
            self._withdraw(device_job)
        elif device_job.pages and not device_job.serves_best:
            self.home.runner.publish(device_job, self.home.epoch(), fresh=False)
        else:  # its best weights, or those of a finished job that was resumed and never had pages here
            result = device_job.result()
            self.home.store.add(device_job.name, result, device_job.shape, config=device_job.lora, replace=True)
        device_job.job.record.close()
        device_job.start_leaving()
        self.home.driver.notify()

    def _withdraw(self, device_job: DeviceJob) -> None:
        """If nothing was published, lets requests to the name fail instead of serving the untrained adapter."""
        job, version = device_job.job, device_job.placeholder
        if version is None or version.name != job.name or not self.home.store.is_current(version):
            return
        why = job.error or "it has published nothing"
        ended = "failed" if job.status == "failed" else "was cancelled"
        self.home.store.fail(job.name, f"adapter {job.name!r}: its job {ended}: {why}")


def _metrics(cfg: TrainConfig) -> MetricsWriter | None:
    if cfg.output_dir is None:
        return None
    try:
        return MetricsWriter(Path(cfg.output_dir) / METRICS)
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise JobError(f"output_dir: got {str(cfg.output_dir)!r}, expected a folder to write to: {error}") from error
