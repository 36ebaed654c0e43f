"""Engine: one base on the device, adapters and jobs on it. Composes the managers and drives the loop."""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from loquetier_jax.adapters.lora import LoraShape, LoraWeights
from loquetier_jax.adapters.pages import pages_of
from loquetier_jax.adapters.store import AdapterStore
from loquetier_jax.config import EngineConfig
from loquetier_jax.errors import EngineError
from loquetier_jax.faces.adapters import AdapterCalls
from loquetier_jax.faces.job_handle import JobHandle
from loquetier_jax.faces.jobs import JobCalls
from loquetier_jax.faces.requests import RequestCalls
from loquetier_jax.jobs.lifecycle import FINISHED
from loquetier_jax.kv.pages import KVPages
from loquetier_jax.kv.slots import Slots
from loquetier_jax.models.load import load_hf
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.presets import engine_config, fitted, overridden
from loquetier_jax.runtime.interrupts import uninterrupted
from loquetier_jax.runtime.loop import Loop
from loquetier_jax.runtime.loop_thread import LoopThread
from loquetier_jax.runtime.score_requests import ScoreRequests
from loquetier_jax.runtime.scoring import Scoring
from loquetier_jax.runtime.serving import Serving
from loquetier_jax.runtime.training import Training
from loquetier_jax.runtime.warmup import (
    BackgroundCompiler,
    compile_serving,
    enable_compilation_cache,
    tell_of_broken_bits,
)
from loquetier_jax.schedule.latency import LatencyModel
from loquetier_jax.schedule.policy import PolicyConfig
from loquetier_jax.serve.tokenizer import load_tokenizer
from loquetier_jax.step.functions import StepFunctions
from loquetier_jax.step.state import new_state

log = logging.getLogger(__name__)


class Engine(AdapterCalls, RequestCalls, JobCalls):
    """Serves and trains many adapters on one base model.

    Nothing runs by itself: `generate`, `stream`, `log_probs` and `JobHandle.wait` drive the loop while they wait, and
    jobs train beside them; or `step()` drives it once. `start()` gives the loop a thread of its own instead.
    `close()`, or the end of a `with` block, ends everything and frees the device; so does dropping the engine.

    Args:
        spec: Architecture of the base.
        params: Its parameters on the device; kept by reference, never copied or changed.
        cfg: Everything fixed for the life of the engine.
        tokenizer: None: prompts are token ids and outputs have no text.
        policy: Settings of the scheduler.
        progress: Whether compiling shows a progress bar.
        name: What exported adapters name as their base model.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        params: Any,
        cfg: EngineConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        policy: PolicyConfig | None = None,
        progress: bool = False,
        name: str = "",
    ) -> None:
        enable_compilation_cache(cfg.compilation_cache_dir)
        tell_of_broken_bits()
        self.spec, self.cfg, self.tokenizer, self.name = spec, cfg, tokenizer, name
        self.state = new_state(spec, cfg, params)
        self.functions = StepFunctions(spec, cfg, self.state)
        self.latency = LatencyModel()
        self.compiler = BackgroundCompiler()
        self.adapters = AdapterStore(
            spec,
            num_pages=cfg.adapter_pages,
            max_pages=cfg.max_lora_pages,
            write=self._write_adapter,
            max_host_adapters=cfg.max_host_adapters,
        )
        self.jobs: dict[str, JobHandle] = {}
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._thread: LoopThread | None = None
        self._closed = False
        self._failure: BaseException | None = None
        self._driver: int | None = None  # the thread that is inside a step
        self._ids = itertools.count()
        self._rng = np.random.default_rng(cfg.seed)
        self.loop = self._new_loop(policy or PolicyConfig())
        score_rows = max((b.score_tokens for b in cfg.buckets), default=0)
        self._scores = ScoreRequests(self.adapters, score_rows, lambda: self.loop.epoch)
        compile_serving(self.functions, self.state, cfg, self.latency, progress)

    def _write_adapter(self, page_ids: Sequence[int], weights: LoraWeights, shape: LoraShape) -> None:
        self.state.write_adapter(page_ids, pages_of(weights, shape, self.spec, jnp.dtype(self.cfg.dtype)))

    def _new_loop(self, policy: PolicyConfig) -> Loop:
        cfg, scoring = self.cfg, Scoring()
        serving = Serving(self.adapters, KVPages(cfg.kv_pages, cfg.kv_page_size), Slots(cfg.max_num_seqs))
        shared = self.functions, self.adapters, self.compiler, scoring
        training = Training(cfg, self.state, *shared, self._job_stepped, self._job_ended)
        return Loop(cfg, self.state, self.functions, serving, scoring, training, self.latency, policy, cfg.slo)

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
            path: config.json, safetensors, tokenizer.
            config: An EngineConfig, a preset of configs/engine/ or a YAML file; None is "gpu" or "cpu" by device.
            policy: Settings of the scheduler.
            progress: Whether to show what is being compiled.
            **overrides: Fields of EngineConfig, e.g. max_adapters=64.

        Raises:
            ConfigError: an unknown field, or max_model_len beyond what the model was made for.
            ModelError: see `models.load.load_hf`.
        """
        if not isinstance(config, EngineConfig):
            config = engine_config(config or ("cpu" if jax.default_backend() == "cpu" else "gpu"))
        cfg = overridden(config, overrides)
        spec, params = load_hf(path, jnp.dtype(cfg.dtype))
        cfg = fitted(cfg, spec.max_position_embeddings, asked="max_model_len" in overrides)
        return cls(spec, params, cfg, load_tokenizer(path), policy=policy, progress=progress, name=str(path))

    # The loop.

    def step(self) -> bool:
        """Drives the loop once; returns whether there was anything to do.

        Raises:
            EngineError: a step has failed, now or before. Its requests and jobs have ended with that error.
            RuntimeError: called from inside a step, i.e. by a listener: tokens of others would come out of order.
        """
        with self._lock, self._boundary():
            worked = self.loop.iterate()
            self._changed.notify_all()
        return worked

    @contextmanager
    def _boundary(self) -> Iterator[None]:
        """What reads or dispatches steps: as a whole, and whatever ends it in the middle is the engine's end."""
        self._check_alive()
        self._refuse_inside_step()
        self._driver = threading.get_ident()
        try:
            with uninterrupted():
                try:
                    yield
                except BaseException as error:  # buffers may be gone, and rows half counted
                    self._lose(error)
                    if not isinstance(error, Exception):
                        raise
                    self._check_alive()
        finally:
            self._driver = None

    def _refuse_inside_step(self) -> None:
        if self._driver == threading.get_ident():
            raise RuntimeError("engine: called from a listener, which may submit and cancel, but not wait for steps")

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("engine: it was closed; make a new one, e.g. by Engine.from_pretrained")

    def _check_alive(self) -> None:
        self._check_open()
        if self._failure is not None:
            raise EngineError(f"engine: a step has failed: {self._failure!r}") from self._failure

    def _lose(self, error: BaseException) -> None:
        log.error("a step has failed", exc_info=error)
        self._failure = error
        self.loop.serving.fail_all(f"a step of the engine has failed: {error!r}", self.loop.clock())
        for trainee in self.loop.training.trainees.values():
            if not trainee.job.finished:
                trainee.job.fail(f"a step of the engine has failed: {error!r}")
        self._changed.notify_all()

    def wait(self, done: Callable[[], bool]) -> None:
        """Drives the loop, or waits for the thread that does, until `done()`.

        Raises:
            EngineError: a step has failed, whoever drove it.
            RuntimeError: nothing is left to do and `done()` is still false, or called from inside a step.
        """
        while not done():
            self._refuse_inside_step()
            if self._thread is not None and self._thread.is_alive():  # it ends before threads that outlive the main one
                with self._changed:
                    if not done():
                        self._changed.wait(0.1)
                    self._check_alive()  # asked before done(), because a failure ends what was waited for, too
                continue
            compiling = self.compiler.busy  # asked first: what it finishes during the step is seen by the next one
            if not self.step():
                if not compiling and not done():
                    raise RuntimeError("engine: nothing is left to do, and what was waited for has not happened")
                time.sleep(0.005)

    def start(self) -> None:
        """Gives the loop a thread of its own, so that jobs train while nobody waits; see `stop`.

        The thread ends with the process, and with the engine when that is dropped.
        """
        with self._entered():
            if self._thread is None:
                self._thread = LoopThread(self.step, self.loop.is_idle, self._changed)
                self._thread.start()

    def stop(self) -> None:
        """Ends the thread of `start`; what is queued stays queued."""
        self._refuse_inside_step()
        if self._thread is not None:
            self._thread.end()
            self._thread = None

    def close(self) -> None:
        """Ends everything and frees the device; calls that need the engine raise EngineError from then on.

        Requests end with an error, jobs as cancelled (`JobHandle.checkpoint` before keeps one). Handles of jobs still
        tell how they went, and `save` works. Closing again does nothing.
        """
        self.stop()
        with self._lock:
            if self._closed:
                return
            self.loop.serving.end_all("the engine was closed", self.loop.clock())
            for trainee in self.loop.training.trainees.values():
                if not trainee.job.finished:
                    trainee.job.cancel()
            while self._failure is None and self.step():
                pass
            self._closed = True
            self._changed.notify_all()
        self.compiler.wait()
        for job in self.jobs.values():
            job.settle()
        self.state.free()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        live = len(self.loop.serving.waiting) + len(self.loop.serving.running)
        unfinished = sum(job.status not in FINISHED for job in self.jobs.values())
        held = f"{len(self.adapters.names())} adapters, {unfinished} jobs under way, {live} requests"
        state = "closed" if self._closed else "failed" if self._failure is not None else held
        return f"<Engine {self.name!r}: {state}>"

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """The lock, of an engine that is open."""
        with self._lock:
            self._check_open()
            yield

    def drain(self) -> None:
        """Reads everything dispatched: afterwards the device is idle. Raises what `step` raises."""
        with self._lock, self._boundary():
            self.loop.drain()

    def check_integrity(self) -> None:
        """Raises IntegrityError unless pages, slots and versions add up."""
        with self._entered():
            self.loop.serving.check_integrity()
            self.loop.training.check_integrity()
