"""One job on the device: its masters, optimizer state, adapter pages and gradient pages."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from loquetier_jax.adapters.lora import LoraConfig, LoraShape, LoraWeights
from loquetier_jax.adapters.pages import AdapterPages, read_pages
from loquetier_jax.adapters.store import AdapterStore
from loquetier_jax.adapters.version import Version
from loquetier_jax.batch.packs import Pack
from loquetier_jax.executables import Program
from loquetier_jax.loop_thread import EngineThread
from loquetier_jax.serve.scoring import Scores
from loquetier_jax.step.compiled import StepFunctions, TrainKey
from loquetier_jax.step.loss_batch import loss_batch
from loquetier_jax.step.state import DeviceState
from loquetier_jax.train.job import Job
from loquetier_jax.train.optimizer import build_optimizer_step, hyperparams
from loquetier_jax.train.packing import Cursor
from pallas_kernels.common import cpu_bits


@dataclass(eq=False)
class DeviceJob:
    """A job's state on the device, independent of all other jobs.

    Attributes:
        job: The host side.
        lora, shape: The adapter's configuration and shape.
        master, opt_state: f32 at exact rank; donated to every optimizer step.
        grads: Initial accumulators (from a checkpoint or another engine), host arrays; None: zeros.
        cast: Initial contents of its pages, on the device (see `AdapterStore.staged`); None once it has started.
        pages: Adapter pages its steps read; () until it starts.
        write_pages: Adapter pages its next optimizer step writes: `pages`, or fresh ones after a publish.
        grad_pages: Its pages of the gradient pool.
        placeholder: The untrained version added under the job's name when the job started; None if the name existed.
        best: The masters with the lowest evaluation loss, if the job keeps them; None before the first evaluation.
        published: The version that took over `pages`, until the next optimizer step; or None.
        held: Number of holds; while positive, none of the job's work is dispatched, because its state is being read.
        saving: The step whose state is being saved, or None. Meanwhile no other save begins, and the job is not
            retired.
        copying: Whether that state is being copied to the host: no optimizer step may overwrite it.
        leaving: The thread that moves an ended job to the host; None before that, and once it has been joined.
        latest: The version it published last; its weights may still be those of `master`.
        run_optimizer, copy_master: The compiled optimizer step and copy of the masters; None until compiled.
        number: Unique in the process (an `id` may be reused).
    """

    job: Job
    lora: LoraConfig
    shape: LoraShape
    master: LoraWeights
    opt_state: Any
    grads: AdapterPages | None = None
    cast: Any = field(default=None, repr=False)
    pages: tuple[int, ...] = ()
    write_pages: tuple[int, ...] = ()
    grad_pages: tuple[int, ...] = ()
    placeholder: Version | None = None
    best: LoraWeights | None = None
    published: Version | None = None
    held: int = 0
    saving: int | None = None
    copying: bool = False
    leaving: EngineThread | None = field(default=None, repr=False)
    latest: Version | None = None
    run_optimizer: Callable[..., Any] | None = field(default=None, repr=False)
    copy_master: Callable[..., Any] | None = field(default=None, repr=False)
    number: int = field(default_factory=itertools.count().__next__)

    @property
    def name(self) -> str:
        """The name of the job and its adapter."""
        return self.job.name

    @property
    def awaits_save(self) -> bool:
        """Whether a due save waits for the previous one; the next pack waits for it."""
        return self.saving is not None and self.saving != self.job.step and self.job.save_due

    @property
    def group(self) -> str:
        """Jobs of equal group and pack length may share a pass: they need the same compiled functions."""
        loss, extras = self.job.cfg.loss, self.job.extras
        own = f"{id(loss)}/{extras}" if callable(loss) else loss
        return f"{self.shape.num_pages}/{self.lora.lora_dropout > 0}/{own}"

    def key(self, packs: int) -> TrainKey:
        """Selects the compiled functions of a pass with `packs` packs."""
        loss = self.job.cfg.loss
        return TrainKey(
            packs=packs,
            pack_tokens=self.job.cfg.pack_rows,
            pages=self.shape.num_pages,
            dropout=self.lora.lora_dropout > 0,
            loss=loss if callable(loss) else None,
            extras=self.job.extras,
        )

    def accept_evaluation(self, functions: StepFunctions, packs: Sequence[Pack], scores: Sequence[Scores]) -> None:
        """Passes a scored evaluation to the job, and keeps the weights if they are the best so far."""
        key, job, losses = self.key(1), self.job, [None] * len(packs)
        if key.loss is not None:  # all dispatched before the first is read
            run = functions.loss_value(key)
            pairs = zip(packs, scores, strict=True)
            values = [run(score["logp"], pack.weights, loss_batch(pack)) for pack, score in pairs]
            losses = [float(value) for value in values]
        for pack, score, loss in zip(packs, scores, losses, strict=True):
            job.eval_pack_finished(pack, score["logp"], score["correct"], loss)
        if job.cfg.keeps_best and self._has_just_improved and job.status not in ("failed", "cancelled"):
            self.best = self.copy_master(self.master)
            for leaf in jax.tree.leaves(self.best):
                leaf.copy_to_host_async()

    @property
    def _has_just_improved(self) -> bool:
        return self.job.best_step == self.job.step

    def enter(self, state: DeviceState, pages: tuple[int, ...], grad_pages: tuple[int, ...]) -> None:
        """Takes over pages, and writes the cast masters and the accumulators into them."""
        self.pages = self.write_pages = pages
        self.grad_pages = grad_pages
        cast, self.cast = self.cast, None
        state.write_adapter(pages, cast)
        grads, self.grads = self.grads, None
        state.write_gradients(grad_pages, self._zeros(state) if grads is None else grads)

    def _zeros(self, state: DeviceState) -> AdapterPages:
        """Zeroed accumulators, as host arrays."""
        count = self.shape.num_pages
        return jax.tree.map(lambda a: np.zeros((count, *a.shape[1:]), np.float32), state.grads)

    def compile_optimizer(self, functions: StepFunctions, state: DeviceState, arrays: tuple[Any, Any]) -> None:
        """Compiles the optimizer step and the copy of the best weights ahead of time.

        Args:
            functions: The engine's.
            state: A DeviceState of shapes.
            arrays: Shapes of `master` and `opt_state`; the job may end and free the arrays while this compiles.
        """
        kind, ids = self.job.cfg.optim, np.zeros(self.shape.num_pages, np.int32)

        def lower_step() -> Program:
            step = build_optimizer_step(functions.spec, self.shape, kind)
            lowered = step.lower(*arrays, state.grads, state.pages, ids, ids, *self._numbers())
            return lowered, cpu_bits.compiler_options()

        def lower_copy() -> Program:
            return jax.jit(partial(jax.tree.map, jnp.copy)).lower(arrays[0]), {}

        self.run_optimizer = functions.kept(("optimizer_step", kind, self.shape), lower_step)
        if self.job.cfg.keeps_best:
            self.copy_master = functions.kept(("copy", self.shape), lower_copy)

    def _numbers(self) -> tuple[Any, ...]:
        """Denominator, max_grad_norm and hyperparameters of the optimizer step that is due."""
        job = self.job
        hyper = hyperparams(job.cfg, job.step, job.total_steps)
        return (
            np.float32(max(job.denominator_dispatched, 1)),
            np.float32(job.cfg.max_grad_norm),
            {name: np.float32(value) for name, value in hyper.items()},
        )

    def optimize(self, state: DeviceState, store: AdapterStore, epoch: int) -> dict[str, jax.Array]:
        """Dispatches the due optimizer step, which updates masters, optimizer state, adapter and gradient pages.

        Returns:
            {"grad_norm", "weight_norm", "finite"} on the device.
        """
        if self.best is not None and self._has_just_improved:
            self.best = jax.tree.map(np.asarray, self.best)  # the copy has had at least an iteration
        if self.published is not None:
            store.weights(self.published)  # its own copy, before the masters it was published from change
        own = self.master, self.opt_state, self.grad_pages, self.write_pages
        self.master, self.opt_state, metrics = state.apply_optimizer(self.run_optimizer, *own, *self._numbers())
        self.pages = self.write_pages
        if self.published is not None:
            store.release(self.published, epoch)
            self.published = None
        return metrics

    @property
    def serves_best(self) -> bool:
        """Whether the job's result differs from its last weights."""
        return self.job.cfg.keeps_best and self.best is not None and not self._has_just_improved

    def result(self) -> LoraWeights:
        """The job's result, on the host: its last weights, or after success the best, if kept."""
        if self.job.status == "succeeded" and self.serves_best:
            return jax.tree.map(np.array, self.best)
        return self.host_weights()

    def host_weights(self) -> LoraWeights:
        """The masters on the host, read-only: a copy while they are on the device."""
        return jax.tree.map(_off_device, self.master)

    def leave_device(self) -> None:
        """Moves what an ended job still needs to the host and frees the rest; nothing else may be using it.

        A job that succeeded can still be saved and checkpointed; any other can only be saved.
        """
        self.master = self.host_weights()
        if self.job.status == "succeeded":
            self.opt_state, self.best = jax.tree.map(_off_device, (self.opt_state, self.best))
        else:
            self.opt_state = self.best = self.grads = None
        self.cast = None
        self.run_optimizer = self.copy_master = None

    def start_leaving(self) -> None:
        """Runs `leave_device` in a thread of its own, so that token generation does not wait for the copy."""
        self.leaving = EngineThread(self.leave_device, "job-to-host")
        self.leaving.start()

    def settle(self) -> None:
        """Returns once an ended job has left the device."""
        if self.leaving is not None:
            self.leaving.join()
            self.leaving = None

    def forget(self) -> None:
        """Frees the weights and the optimizer state of an ended job."""
        self.settle()
        self.master = self.opt_state = self.best = self.grads = self.latest = None

    def accumulators(self, state: DeviceState) -> AdapterPages:
        """The job's accumulated gradients: a copy on the device, or host arrays."""
        if self.grads is not None:
            return self.grads
        fresh = self.job.cursor == Cursor(self.job.step)  # no pack since the optimizer step zeroed them
        if fresh or not self.grad_pages:  # without pages, it has not started or has ended
            return self._zeros(state)
        return read_pages(state.grads, self.grad_pages)


def _off_device(array: jax.Array | np.ndarray) -> np.ndarray:
    """A copy on the host (on CPU, a view would keep the device buffer alive). Host arrays are returned as they are."""
    return np.array(array) if isinstance(array, jax.Array) else array
