"""One job on the device: its masters, optimizer state, pages, and its place in the gradient pool."""

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
from loquetier_jax.loop_thread import EngineThread
from loquetier_jax.models.spec import DecoderSpec
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
    """What a job owns on the device. Its numbers depend on nothing else.

    Attributes:
        job: The host side.
        lora, shape: Its adapter.
        master, opt_state: f32 at exact rank; donated through every optimizer step.
        grads: Accumulators to start from (of a checkpoint or another engine), host arrays; None: zeros.
        cast: What its pages begin with, on the host; None once it has started.
        pages: Adapter pages its steps read; () until it starts.
        write_pages: Adapter pages its next optimizer step writes: `pages`, or fresh ones after a publish.
        grad_pages: Its pages of the gradient pool.
        placeholder: The version that the name got when the job was started, if it got one: nothing that was trained.
        best: The masters of the lowest evaluation loss, where the job keeps them; None before the first.
        published: The version that took over `pages`, until the next optimizer step; or None.
        held: How many want it to rest between two packs, because its state is being looked at.
        saving: The step whose state is being saved; None while none is. No other save begins, and the job is not
            retired.
        copying: Whether that state is being copied to the host: no optimizer step may overwrite it.
        leaving: The thread in which it leaves the device; None before its end, and once somebody has waited for it.
        latest: The version it published last; its weights may still be those of `master`.
        run_optimizer, copy_master: The compiled optimizer step and copy of the masters; None until compiled.
        number: Of this device_job alone, in the whole process (an `id` may come again).
    """

    job: Job
    lora: LoraConfig
    shape: LoraShape
    master: LoraWeights
    opt_state: Any
    grads: AdapterPages | None = None
    cast: AdapterPages | None = field(default=None, repr=False)
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
        """Of the job and its adapter."""
        return self.job.name

    @property
    def awaits_save(self) -> bool:
        """Whether a save is due that waits for the one before, and the next pack for it."""
        return self.saving is not None and self.saving != self.job.step and self.job.save_due

    @property
    def group(self) -> str:
        """Jobs of equal group and pack length may ride one step: they need the same compiled functions."""
        loss, extras = self.job.cfg.loss, self.job.extras
        own = f"{id(loss)}/{extras}" if callable(loss) else loss
        return f"{self.shape.num_pages}/{self.lora.lora_dropout > 0}/{own}"

    def key(self, packs: int) -> TrainKey:
        """The compiled functions of a pass of `packs` packs."""
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
        """Hands a scored evaluation to the job, and keeps the weights if they are the best so far."""
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
        """Moves in: writes the cast of the masters and the accumulators into pages that are now the job's."""
        self.pages = self.write_pages = pages
        self.grad_pages = grad_pages
        cast, self.cast = self.cast, None
        state.write_adapter(pages, cast)
        grads, self.grads = self.grads, None
        state.write_gradients(grad_pages, self._zeros(state) if grads is None else grads)

    def _zeros(self, state: DeviceState) -> AdapterPages:
        """Accumulators of a job that has accumulated nothing."""
        count = self.shape.num_pages
        return jax.tree.map(lambda a: np.zeros((count, *a.shape[1:]), np.float32), state.grads)

    def compile_optimizer(self, state: DeviceState, spec: DecoderSpec, arrays: tuple[Any, Any]) -> None:
        """Compiles the optimizer step ahead of time, and what keeps the best weights; jobs of one kind share it.

        Args:
            state: A DeviceState of shapes.
            spec: The base.
            arrays: Shapes of `master` and `opt_state`; the job may end, and let them go, while this compiles.
        """
        step = build_optimizer_step(spec, self.shape, self.job.cfg.optim)
        ids = np.zeros(self.shape.num_pages, np.int32)
        self.run_optimizer = step.lower(
            *arrays, state.grads, state.pages, ids, ids, *self._numbers()
        ).compile(cpu_bits.compiler_options())
        if self.job.cfg.keeps_best:
            self.copy_master = jax.jit(partial(jax.tree.map, jnp.copy)).lower(arrays[0]).compile()

    def _numbers(self) -> tuple[Any, ...]:
        """denom, max_grad_norm and hyperparameters of the step whose packs have all been dispatched."""
        job = self.job
        hyper = hyperparams(job.cfg, job.step, job.total_steps)
        return (
            np.float32(max(job.denominator_dispatched, 1)),
            np.float32(job.cfg.max_grad_norm),
            {name: np.float32(value) for name, value in hyper.items()},
        )

    def optimize(self, state: DeviceState, store: AdapterStore, epoch: int) -> dict[str, jax.Array]:
        """Dispatches the optimizer step that is due: masters, optimizer state, pages and pool move on.

        Returns:
            {"grad_norm", "weight_norm", "finite"} on the device.
        """
        if self.best is not None and self._has_just_improved:
            self.best = jax.tree.map(np.asarray, self.best)  # on the host by now: an iteration or more has passed
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
        """Whether the job ends with other weights than its last ones."""
        return self.job.cfg.keeps_best and self.best is not None and not self._has_just_improved

    def result(self) -> LoraWeights:
        """The weights that the job comes to, on the host: its last ones, or the best once it has succeeded."""
        if self.job.status == "succeeded" and self.serves_best:
            return jax.tree.map(np.array, self.best)
        return self.host_weights()

    def host_weights(self) -> LoraWeights:
        """The masters on the host, not to be written to: a copy while they are on the device."""
        return jax.tree.map(_off_device, self.master)

    def leave_device(self) -> None:
        """Moves what an ended job still needs to the host, and lets the rest go; nothing else may be using it.

        What has succeeded can be saved and checkpointed, what has not can only be saved.
        """
        self.master = self.host_weights()
        if self.job.status == "succeeded":
            self.opt_state, self.best = jax.tree.map(_off_device, (self.opt_state, self.best))
        else:
            self.opt_state = self.best = self.grads = None
        self.cast = None
        self.run_optimizer = self.copy_master = None

    def start_leaving(self) -> None:
        """`leave_device` in a thread of its own: a second of copying would be a second in which no token comes."""
        self.leaving = EngineThread(self.leave_device, "job-to-host")
        self.leaving.start()

    def settle(self) -> None:
        """Returns once an ended job has left the device."""
        if self.leaving is not None:
            self.leaving.join()
            self.leaving = None

    def forget(self) -> None:
        """Lets the weights and the optimizer state of a job that has left the device go."""
        self.settle()
        self.master = self.opt_state = self.best = self.grads = self.latest = None

    def accumulators(self, state: DeviceState) -> AdapterPages:
        """What the gradient pool holds for this job: a copy on the device, or host arrays."""
        if self.grads is not None:
            return self.grads
        fresh = self.job.cursor == Cursor(self.job.step)  # nothing since the optimizer step, which zeroed them
        if fresh or not self.grad_pages:  # without pages it has not started, or is over
            return self._zeros(state)
        return read_pages(state.grads, self.grad_pages)


def _off_device(array: jax.Array | np.ndarray) -> np.ndarray:
    """A copy: on the CPU a mere view would keep the device's buffer alive. Host arrays come back as they are."""
    return np.array(array) if isinstance(array, jax.Array) else array
