"""Engine: one base model on the device with adapters and jobs. A facade over the parts that do the work."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from loquetier_jax.adapters.casts import page_casts
from loquetier_jax.adapters.manager import AdapterManager
from loquetier_jax.adapters.staging import stager
from loquetier_jax.adapters.store import AdapterStore
from loquetier_jax.config import EngineConfig
from loquetier_jax.delegate import delegate
from loquetier_jax.driver import Driver
from loquetier_jax.executables import executables_in
from loquetier_jax.models.load import load_hf
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.pool import IdPool
from loquetier_jax.presets import engine_config, fitted, overridden
from loquetier_jax.runtime.loop import Loop
from loquetier_jax.runtime.warmup import compile_serving, enable_compilation_cache, tell_of_broken_bits
from loquetier_jax.schedule.latency import LatencyModel
from loquetier_jax.schedule.policy import PolicyConfig
from loquetier_jax.serve.frontend import RequestFrontend
from loquetier_jax.serve.kv import KVPages
from loquetier_jax.serve.queue import RequestQueue
from loquetier_jax.serve.score_requests import ScoreRequests
from loquetier_jax.serve.scoring import Scoring
from loquetier_jax.serve.tokenizer import load_tokenizer
from loquetier_jax.serve.tokenizer_type import PreTrainedTokenizerBase
from loquetier_jax.step.compiled import StepFunctions
from loquetier_jax.step.compiler import BackgroundCompiler
from loquetier_jax.step.memory import sized
from loquetier_jax.step.state import new_state
from loquetier_jax.train.handle import JobHandle
from loquetier_jax.train.home import JobHome
from loquetier_jax.train.lifecycle import FINISHED
from loquetier_jax.train.manager import JobManager
from loquetier_jax.train.runner import JobRunner


class Engine:
    """Serves and trains many adapters on one base model.

    Nothing runs in the background by default: `generate`, `stream`, `log_probs` and `JobHandle.wait` drive the loop
    while they wait, and jobs train alongside; `step()` drives it once. `start()` runs the loop in its own thread.
    `close()`, or leaving a `with` block, ends all work and frees the device; so does garbage collection.
    Every method may be called from any thread; only those that wait for results wait for a step.

    Args:
        spec: Architecture of the base.
        params: Its parameters on the device; kept by reference, never copied or modified.
        cfg: Configuration, fixed for the life of the engine.
        tokenizer: If None, prompts are token ids and outputs have no text. A Future is waited for when everything has
            been compiled.
        policy: Settings of the scheduler.
        progress: Whether to show a progress bar while compiling.
        name: Base model name written into exported adapters.

    Attributes:
        adapters: The adapters, by name.
        jobs: Job handles, by name.
        requests, scores, adapter_manager, job_manager: The parts that implement the methods.
        driver: Drives the loop and delivers commands to it.
        loop: Runs one iteration.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        params: Any,
        cfg: EngineConfig,
        tokenizer: PreTrainedTokenizerBase | Future[PreTrainedTokenizerBase] | None = None,
        *,
        policy: PolicyConfig | None = None,
        progress: bool = False,
        name: str = "",
    ) -> None:
        enable_compilation_cache(cfg.compilation_cache_dir)
        executables = executables_in(cfg.compilation_cache_dir)
        tell_of_broken_bits(executables)
        cfg = sized(spec, cfg)
        self.spec, self.cfg, self.name = spec, cfg, name
        self.state = new_state(spec, cfg, params, executables)
        self.functions = StepFunctions(spec, cfg, self.state, executables)
        self.latency = LatencyModel()
        later = tokenizer if isinstance(tokenizer, Future) else None
        compile_serving(self.functions, self.state, cfg, self.latency, progress, later)
        self.tokenizer = tokenizer if later is None else later.result()
        self.compiler = BackgroundCompiler()
        self.adapters = AdapterStore(
            spec,
            num_pages=cfg.adapter_pages,
            max_pages=cfg.max_lora_pages,
            max_host_adapters=cfg.max_host_adapters,
            **page_casts(spec, jnp.dtype(cfg.dtype)),
            stage=stager(spec, self.functions.page_unpacker),
            write=self.state.write_adapter,
        )
        self.loop = self._new_loop(policy or PolicyConfig())
        loader = self.adapters.loader
        background = lambda: self.compiler.busy or self.job_manager.saver.busy  # noqa: E731
        self.driver = Driver(self.loop, background, lambda: (loader.busy, loader.ended))
        loader.changed = self.driver.notify
        self._compose()

    def _new_loop(self, policy: PolicyConfig) -> Loop:
        cfg, scoring = self.cfg, Scoring()
        kv = KVPages(cfg.kv_pages, cfg.kv_page_size, prefix_caching=cfg.enable_prefix_caching)
        slots = IdPool(range(cfg.max_num_seqs), "slots")
        serving = RequestQueue(self.adapters, kv, slots)
        training = JobRunner(cfg, self.state, self.functions, self.adapters, self.compiler, scoring)
        return Loop(cfg, self.state, self.functions, serving, scoring, training, self.latency, policy, cfg.slo)

    def _compose(self) -> None:
        spec, cfg, loop, driver = self.spec, self.cfg, self.loop, self.driver

        def epoch() -> int:
            return loop.epoch

        rows = max((b.score_tokens for b in cfg.buckets), default=0)
        tokenizer = self.tokenizer
        scores = ScoreRequests(self.adapters, loop.scoring, driver, rows, epoch, tokenizer, spec.vocab_size)
        parts = driver, loop.serving, loop.scoring, scores
        home = JobHome(spec, self.state, self.adapters, driver, loop.training, epoch, self.name)
        self.requests = RequestFrontend(spec, cfg, tokenizer, *parts, lambda: loop.clock(), epoch)
        self.scores = scores
        self.adapter_manager = AdapterManager(spec, self.adapters, driver, self.name)
        self.job_manager = JobManager(home, cfg, tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        config: EngineConfig | str | None = None,
        policy: PolicyConfig | None = None,
        progress: bool = True,
        **overrides: Any,
    ) -> "Engine":
        """Loads a HF model folder and compiles the serving buckets.

        Args:
            path: Folder with config.json, safetensors and a tokenizer.
            config: An EngineConfig, a preset of configs/engine/ or a YAML file; None picks "gpu" or "cpu" by device.
            policy: Settings of the scheduler.
            progress: Whether to show a progress bar while compiling.
            **overrides: Fields of EngineConfig, e.g. max_adapters=64.

        Raises:
            ConfigError: an unknown field, or a max_model_len beyond the model's limit.
            ModelError: see `models.load.load_hf`.
        """
        if not isinstance(config, EngineConfig):
            config = engine_config(config or ("cpu" if jax.default_backend() == "cpu" else "gpu"))
        cfg = overridden(config, overrides)
        with ThreadPoolExecutor(1, "tokenizer") as pool:  # importing transformers takes a second
            tokenizer = pool.submit(load_tokenizer, path)
            spec, params = load_hf(path, jnp.dtype(cfg.dtype), executables_in(cfg.compilation_cache_dir))
            cfg = fitted(cfg, spec.max_position_embeddings, asked="max_model_len" in overrides)
            if tokenizer.done():
                tokenizer.result()  # raises before anything is compiled
            return cls(spec, params, cfg, tokenizer, policy=policy, progress=progress, name=str(path))

    # Requests.

    submit = delegate("requests", RequestFrontend.submit)
    cancel = delegate("requests", RequestFrontend.cancel)
    generate = delegate("requests", RequestFrontend.generate)
    stream = delegate("requests", RequestFrontend.stream)
    reset_prefix_cache = delegate("requests", RequestFrontend.reset_prefix_cache)
    log_probs = delegate("scores", ScoreRequests.log_probs)

    # Adapters.

    load_adapter = delegate("adapter_manager", AdapterManager.load_adapter)
    add_adapter = delegate("adapter_manager", AdapterManager.add_adapter)
    unload_adapter = delegate("adapter_manager", AdapterManager.unload_adapter)
    rename_adapter = delegate("adapter_manager", AdapterManager.rename_adapter)
    pin_adapter = delegate("adapter_manager", AdapterManager.pin_adapter)
    save_adapter = delegate("adapter_manager", AdapterManager.save_adapter)
    export_merged = delegate("adapter_manager", AdapterManager.export_merged)

    # Jobs.

    finetune = delegate("job_manager", JobManager.finetune)
    resume_job = delegate("job_manager", JobManager.resume_job)
    forget_job = delegate("job_manager", JobManager.forget_job)
    adopt_job = delegate("job_manager", JobManager.adopt_job)

    @property
    def jobs(self) -> dict[str, JobHandle]:
        """Job handles by name; ended jobs stay until they are forgotten or their name is reused."""
        return self.job_manager.home.jobs

    # The loop.

    step = delegate("driver", Driver.step)
    wait = delegate("driver", Driver.wait)
    drain = delegate("driver", Driver.drain)
    start = delegate("driver", Driver.start)
    stop = delegate("driver", Driver.stop)

    def close(self) -> None:
        """Ends all work and frees the device; later calls that need the engine raise EngineError.

        Requests end with an error, jobs as cancelled; call `JobHandle.checkpoint` first to keep one. Saves under way
        are completed. Job handles still report their results, and `save` still works. Closing twice is harmless.
        """
        driver, loop = self.driver, self.loop
        driver.stop()
        if driver.closed or not driver.begin_closing():
            return
        saver = self.job_manager.saver
        self.adapters.close()  # first: nothing more becomes ready
        try:
            with driver.entered():
                loop.serving.end_all("the engine was closed", loop.clock())
                for device_job in loop.training.device_jobs.values():
                    if not device_job.job.finished:
                        device_job.job.cancel()
            while driver.failure is None and (driver.step() or saver.wait()):
                pass
        finally:
            driver.close()
        self.compiler.wait()
        saver.wait()
        for job in list(self.jobs.values()):
            job.settle()
        self.state.free()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        live = len(self.loop.serving.waiting) + len(self.loop.serving.running)
        unfinished = sum(job.status not in FINISHED for job in list(self.jobs.values()))
        held = f"{len(self.adapters.names())} adapters, {unfinished} jobs under way, {live} requests"
        state = "closed" if self.driver.closed else "failed" if self.driver.failure is not None else held
        return f"<Engine {self.name!r}: {state}>"

    def check_integrity(self) -> None:
        """Raises IntegrityError unless pages, slots and versions are consistent."""
        with self.driver.entered():
            self.loop.serving.check_integrity()
            self.loop.training.check_integrity()
