"""All compiled functions of an engine, compiled ahead of time from static shapes: nothing compiles after warm-up."""

import functools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from loquetier_jax.adapters.pages import AdapterPages, write_padded
from loquetier_jax.adapters.staging import layer_of
from loquetier_jax.batch.packs import ExtraNames, empty_extras
from loquetier_jax.batch.rows import empty_batch, empty_sample, host_tree_size, shapes_of
from loquetier_jax.config import Bucket, EngineConfig
from loquetier_jax.executables import NOWHERE, Executables, Program
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.sampling_params import Level
from loquetier_jax.step import backward, forward_slices
from loquetier_jax.step.compile_key import compile_key
from loquetier_jax.step.loss import Loss, loss_value
from loquetier_jax.step.loss_batch import LossBatch
from loquetier_jax.step.sample import admit_slot, sample_hidden
from loquetier_jax.step.state import DeviceState, head_params
from loquetier_jax.step.unified import jit_unified_step
from pallas_kernels.common import cpu_bits
from pallas_kernels.smlm import FEW_ROWS

log = logging.getLogger(__name__)


def compiler_options(bucket: Bucket) -> dict[str, str]:
    """XLA options of a bucket's forward; on CPU, those that make rows bit-identical (see `cpu_bits`).

    On a GPU with few decode rows, independent kernels run concurrently: LoRA deltas are hidden behind the base GEMMs,
    and cache writes overlap. Temporaries then do not share memory, which is negligible at decode but would double it
    (0.5 GB more) in a mixed step or a backward.
    """
    if bucket.rows == bucket.decode <= FEW_ROWS and jax.default_backend() == "gpu":
        return {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
    return cpu_bits.compiler_options()


def _lower(f: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()) -> Program:
    # Unused arguments are kept: see `Executables.get`.
    lowered = jax.jit(f, donate_argnums=donate, keep_unused=True).lower(*arguments)
    return lowered, cpu_bits.compiler_options()


@dataclass(frozen=True)
class TrainKey:
    """What the compiled functions of a training pass depend on; jobs with equal keys can share a pass.

    Attributes:
        packs, pack_tokens: Number of packs and rows per pack.
        pages: Maximum rank-16 pages of an adapter in the pass.
        dropout: Whether any of the jobs has LoRA dropout.
        loss: None for cross-entropy, or the jobs' custom loss.
        extras: The samples' extra inputs to it.
    """

    packs: int
    pack_tokens: int
    pages: int
    dropout: bool = False
    loss: Loss | None = None
    extras: ExtraNames = ()

    @property
    def bucket(self) -> Bucket:
        """The bucket of a step with only these packs."""
        return Bucket(packs=self.packs, pack_tokens=self.pack_tokens)


class StepFunctions:
    """Compiles every step function once and caches it.

    Thread-safe: a background thread may compile training functions while serving functions run. Compiled functions
    reject other shapes with a TypeError, so that a step outside the bucket list fails visibly.

    Args:
        spec, cfg: The base and the engine.
        state: The arrays, or their shapes.
        executables: Where compiled functions are kept between starts, all but those of custom losses: a Python
            function has no identity beyond its process.
    """

    def __init__(
        self, spec: DecoderSpec, cfg: EngineConfig, state: DeviceState, executables: Executables = NOWHERE
    ) -> None:
        self.spec, self.cfg = spec, cfg
        self._executables = executables
        self._params, self._pages = shapes_of(state.params), shapes_of(state.pages)
        self._kv, self._slots, self._grads = (
            shapes_of(state.kv),
            shapes_of(state.slots),
            shapes_of(state.grads),
        )
        arrays = self._params, self._pages, self._kv, self._slots, self._grads
        self._made_from = compile_key(spec, cfg, arrays)
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._lock = threading.Lock()
        self._building: dict[Any, threading.Lock] = {}

    def _get(self, key: Any, build: Callable[[], Program], kept: bool = True) -> Callable[..., Any]:
        if key in self._compiled:
            return self._compiled[key]
        with self._lock:
            own = self._building.setdefault(key, threading.Lock())
        with own:  # of two threads that need the same function, one compiles and the other waits
            if key not in self._compiled:
                log.debug("loading or compiling %s", key)
                executables = self._executables if kept else NOWHERE
                self._compiled[key] = executables.get((key, self._made_from), build)
        return self._compiled[key]

    def kept(self, key: Any, build: Callable[[], Program]) -> Callable[..., Any]:
        """A compiled function that the caller caches, kept on disk as those of steps are; see `Executables.get`.

        Args:
            key: What it is made from beside spec, cfg and the shapes of the engine's arrays.
            build: Traces and lowers it.
        """
        return self._executables.get((key, self._made_from), build)

    def forward(self, bucket: Bucket, dropout: bool = False) -> Callable[..., Any]:
        """(params, pages, kv*, last_token, flat) -> (kv, ForwardOut); * donated."""

        def build() -> Program:
            step = jit_unified_step(self.spec, self.cfg, bucket, dropout)
            flat = self._flat(empty_batch(bucket, self.cfg))
            arguments = self._params, self._pages, self._kv, self._slots.last_token, flat
            return step.lower(*arguments), compiler_options(bucket)

        return self._get(("forward", bucket, dropout), build)

    def sampler(self, rows: int, level: Level) -> Callable[..., Any]:
        """(head, slots*, x [rows, D], flat) -> (slots, {"tokens", "logprob", ...}); * donated."""
        template = shapes_of(empty_sample(rows, self.cfg))
        x = jax.ShapeDtypeStruct((rows, self.spec.hidden_size), jnp.dtype(self.cfg.dtype))

        def build() -> Program:
            f = functools.partial(sample_hidden, self.spec, level, self.cfg.max_logprobs, template)
            return _lower(f, head_params(self._params), self._slots, x, self._flat(template), donate=(1,))

        return self._get(("sampler", rows, level), build)

    def admit(self) -> Callable[..., Any]:
        """(slots*, slot, prompt [max_model_len], length) -> slots."""
        scalar = jax.ShapeDtypeStruct((), jnp.int32)
        prompt = jax.ShapeDtypeStruct((self.cfg.max_model_len,), jnp.int32)
        return self._get("admit", lambda: _lower(admit_slot, self._slots, scalar, prompt, scalar, donate=(0,)))

    def page_writer(self, count: int) -> Callable[..., Any]:
        """(pages*, page ids [count], pages to write) -> pages; * donated."""
        return self._get(("write_pages", count), lambda: self._writer(self._pages, count))

    def gradient_writer(self) -> Callable[..., Any]:
        """The same for one page of the gradient pool."""
        return self._get("write_gradients", lambda: self._writer(self._grads, 1))

    def _writer(self, stack: AdapterPages, count: int) -> Program:
        new = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype), stack)
        return write_padded.lower(stack, jax.ShapeDtypeStruct((count,), jnp.int32), new), {}

    def page_unpacker(self, count: int) -> Callable[..., Any]:
        """(flat pages [count, N], layer) -> the pages of that layer."""
        columns = sum(leaf.size // leaf.shape[0] for leaf in jax.tree.leaves(self._pages))
        flat = jax.ShapeDtypeStruct((count, columns), jnp.dtype(self.cfg.dtype))
        index = jax.ShapeDtypeStruct((), jnp.int32)
        return self._get(("page_unpacker", count), lambda: (layer_of.lower(self.spec, flat, index), {}))

    def forward_start(self, key: TrainKey) -> Callable[..., Any]:
        """(params, flat) -> x."""
        template = shapes_of(empty_batch(key.bucket, self.cfg))

        def build() -> Program:
            f = functools.partial(forward_slices.forward_start, self.spec, template)
            return _lower(f, self._params, self._flat(template))

        return self._get(("forward_start", key.bucket), build)

    def forward_slice(self, key: TrainKey, start: int, stop: int) -> Callable[..., Any]:
        """(layers, pages, x, flat) -> (x, kept) for layers [start, stop).

        With dropout the layer index determines the mask, so every slice has its own compile.
        """
        template = shapes_of(empty_batch(key.bucket, self.cfg))
        windows = self.spec.sliding_window[start:stop]

        def build() -> Program:
            f = functools.partial(
                forward_slices.forward_slice, self.spec, self.cfg, key.bucket, template, key.dropout, start
            )
            layers, pages = self._params["layers"][start:stop], self._pages.cut(start, stop)
            return _lower(f, layers, pages, self._hidden(key), self._flat(template))

        where = start if key.dropout else None
        return self._get(("forward_slice", key.bucket, key.dropout, windows, where), build)

    def forward_end(self, key: TrainKey) -> Callable[..., Any]:
        """(head, x, flat) -> {"logp", "correct"}."""
        template = shapes_of(empty_batch(key.bucket, self.cfg))

        def build() -> Program:
            f = functools.partial(forward_slices.forward_end, self.spec, self.cfg, template)
            return _lower(f, head_params(self._params), self._hidden(key), self._flat(template))

        return self._get(("forward_end", key.bucket), build)

    def backward_start(self, key: TrainKey) -> Callable[..., Any]:
        """(head, hidden, logp, flat, extras) -> (dx, losses)."""
        template = shapes_of(empty_batch(key.bucket, self.cfg)).train

        def build() -> Program:
            f = functools.partial(backward.backward_start, self.spec, self.cfg, key.packs, key.loss, template)
            logp = jax.ShapeDtypeStruct((key.bucket.train_rows,), jnp.float32)
            extras = shapes_of(empty_extras(key.extras, key.packs, key.pack_tokens))
            return _lower(f, head_params(self._params), self._hidden(key), logp, self._flat(template), extras)

        return self._get(("backward_start", key.bucket, key.loss, key.extras), build, kept=key.loss is None)

    def loss_value(self, key: TrainKey) -> Callable[..., Any]:
        """(logp [L], weights [L], LossBatch) -> the loss of one scored pack, for jobs with a custom loss."""
        rows = jax.ShapeDtypeStruct((key.pack_tokens,), jnp.float32)
        ints = jax.ShapeDtypeStruct((key.pack_tokens,), jnp.int32)
        extras = empty_extras(key.extras, 1, key.pack_tokens)
        batch = LossBatch(ints, ints, ints, shapes_of({name: a[0] for name, a in extras.items()}))

        def build() -> Program:
            return _lower(functools.partial(loss_value, key.loss), rows, rows, batch)

        return self._get(("loss_value", key.pack_tokens, key.loss, key.extras), build, kept=False)

    def backward_slice(self, key: TrainKey, start: int, stop: int) -> Callable[..., Any]:
        """(layers, pages, kept, dx, grads*, first, flat) -> (dx, grads) for layers [start, stop)."""
        template = shapes_of(empty_batch(key.bucket, self.cfg)).train
        windows = self.spec.sliding_window[start:stop]

        def build() -> Program:
            f = functools.partial(
                backward.backward_slice,
                self.spec,
                self.cfg,
                key.pack_tokens,
                key.pages,
                key.dropout,
                start,
                template,
            )
            return _lower(
                f,
                self._params["layers"][start:stop],
                self._pages.cut(start, stop),
                [self._kept(key)] * (stop - start),
                self._hidden(key),
                self._grads.cut(start, stop),
                jax.ShapeDtypeStruct((), jnp.int32),
                self._flat(template),
                donate=(4,),
            )

        return self._get(("backward_slice", key.bucket, key.pages, key.dropout, windows), build)

    def slices(self, length: int) -> list[tuple[int, int]]:
        """[start, stop) of consecutive slices of `length` layers, first to last; 0 gives one slice of all layers."""
        layers = self.spec.num_hidden_layers
        step = length or layers
        return [(a, min(a + step, layers)) for a in range(0, layers, step)]

    def prepare_training(self, key: TrainKey) -> None:
        """Compiles everything that a pass of this key by itself may run: whole and sliced, forward and backward."""
        lengths = {0, self.cfg.slice_layers}
        self.forward(key.bucket, key.dropout)
        self.backward_start(key)
        if key.loss is not None:
            self.loss_value(key)
        for start, stop in [s for length in lengths for s in self.slices(length)]:
            self.backward_slice(key, start, stop)
        if self.cfg.slice_layers:
            self.forward_start(key)
            self.forward_end(key)
            for start, stop in self.slices(self.cfg.slice_layers):
                self.forward_slice(key, start, stop)

    def _flat(self, template: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((host_tree_size(template),), jnp.int32)

    def _hidden(self, key: TrainKey) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((key.bucket.train_rows, self.spec.hidden_size), jnp.dtype(self.cfg.dtype))

    def _kept(self, key: TrainKey) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the activations kept for one layer, which are the same for all layers."""
        template = shapes_of(empty_batch(key.bucket, self.cfg))
        f = functools.partial(forward_slices.forward_slice, self.spec, self.cfg, key.bucket, template, key.dropout, 0)
        arrays = self._params["layers"][:1], self._pages.cut(0, 1), self._hidden(key), self._flat(template)
        _, (kept,) = jax.eval_shape(f, *arrays)
        return kept
