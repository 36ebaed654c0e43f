"""The device arrays of an engine, each with exactly one owner, and all code that writes them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from loquetier_jax.adapters.flat import FlatPages
from loquetier_jax.adapters.lora import LoraWeights
from loquetier_jax.adapters.pages import AdapterPages, padded_count, write_counts, write_padded, write_pages
from loquetier_jax.config import EngineConfig
from loquetier_jax.executables import NOWHERE, Executables
from loquetier_jax.models.decoder import Params
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.step.compile_key import compile_key
from loquetier_jax.step.kv_cache import KVCache
from loquetier_jax.step.sample import SlotState, empty_slots
from loquetier_jax.step.unified import ForwardOut, Kept


def _uncompiled(count: int) -> Callable[..., AdapterPages]:
    return write_padded


@jax.tree_util.register_dataclass
@dataclass
class DeviceState:
    """All device arrays that outlive a step.

    Its methods are the only writers: they pass arrays to compiled functions that donate them, and store the results.
    Nothing else may hold a reference to a donated array across a dispatch. A pytree, so that `shapes_of` applies.

    Attributes:
        params: The frozen base; never donated or written.
        pages: P adapter pages, compute dtype; page 0 is zeros.
        grads: The gradient pool, TP + 1 pages, f32; page 0 is trash.
        kv: KV cache per layer; page 0 is trash.
        slots: Per-request state, see SlotState.
        page_writer: Gives `adapters.pages.write_padded` for `pages`, compiled or not, by number of pages.
        gradient_writer: The same for one page of `grads`.
    """

    params: Params
    pages: AdapterPages
    grads: AdapterPages
    kv: list[KVCache]
    slots: SlotState
    page_writer: Callable[[int], Any] = field(default=_uncompiled, metadata={"static": True}, repr=False)
    gradient_writer: Callable[..., Any] = field(default=write_padded, metadata={"static": True}, repr=False)

    def free(self) -> None:
        """Drops all arrays; no other method may be called afterwards."""
        vars(self).clear()

    def run_forward(self, run: Callable[..., Any], flat: Int[Array, " N"]) -> ForwardOut:
        """Dispatches one forward, which updates the KV cache.

        Args:
            run: `StepFunctions.forward` for the batch's bucket.
            flat: The batch as one int32 buffer on the device.
        """
        self.kv, out = run(self.params, self.pages, self.kv, self.slots.last_token, flat)
        return out

    def sample(self, run: Callable[..., Any], x: Float[Array, "n D"], flat: Int[Array, " N"]) -> dict[str, Array]:
        """Dispatches the sampler after a forward; it updates the slots, from which the next forward takes its tokens.

        Args:
            run: `StepFunctions.sampler` for this number of rows.
            x: The forward's `sample_hidden`.
            flat: The SampleRows as one int32 buffer on the device.

        Returns:
            See `step.sample.sample`.
        """
        self.slots, sampled = run(head_params(self.params), self.slots, x, flat)
        return sampled

    def admit(self, run: Callable[..., Any], slot: int, prompt: Sequence[int], max_model_len: int) -> None:
        """Resets a slot for a new request.

        Args:
            run: `StepFunctions.admit`.
            slot: The request's slot.
            prompt: Its token ids, at most `max_model_len`.
            max_model_len: Length that the prompt is padded to.
        """
        padded = np.zeros(max_model_len, np.int32)
        padded[: len(prompt)] = prompt
        self.slots = run(self.slots, np.int32(slot), padded, np.int32(len(prompt)))

    def write_adapter(self, page_ids: Sequence[int], pages: AdapterPages) -> None:
        """Writes an adapter's pages in place, in one call; see `adapters.pages.write_pages`."""
        self.pages = write_pages(self.pages, page_ids, pages, self.page_writer(padded_count(pages.num_pages)))

    def write_gradients(self, page_ids: Sequence[int], grads: AdapterPages) -> None:
        """Writes f32 accumulators into pages of the gradient pool in place; otherwise like `write_adapter`."""
        for at, page_id in enumerate(page_ids):  # one by one: rare, and one compile serves adapters of all ranks
            page = jax.tree.map(lambda leaf, at=at: np.asarray(leaf)[at : at + 1], grads)
            self.grads = write_pages(self.grads, (page_id,), page, self.gradient_writer)

    def warm_page_writes(
        self,
        page_writer: Callable[[int], Callable[..., Any]],
        gradient_writer: Callable[..., Any],
        stage: Callable[[FlatPages], AdapterPages],
        most: int,
    ) -> None:
        """Uses compiled page writes from now on.

        Loads them by writing zeros to pages of each stack, which must still be zeros.

        Args:
            page_writer, gradient_writer: Those of `StepFunctions`.
            stage: Transfers flat pages (see `staging.stager`).
            most: Maximum pages of one adapter.
        """
        self.page_writer, self.gradient_writer = page_writer, gradient_writer
        leaves = jax.tree.leaves(self.pages)
        columns, dtype = sum(leaf.size // leaf.shape[0] for leaf in leaves), leaves[0].dtype
        for count in write_counts(min(most, self.pages.num_pages - 1)):
            held = min(count, self.pages.num_pages - 1)
            self.write_adapter(range(1, held + 1), stage(np.zeros((held, columns), dtype)))
        one = jax.tree.map(lambda a: np.zeros((1, *a.shape[1:]), a.dtype), self.grads)
        self.write_gradients((1,), one)

    def backward(
        self,
        run: Callable[..., Any],
        start: int,
        stop: int,
        kept: Kept,
        dx: Float[Array, "T D"],
        flat: Int[Array, " N"],
    ) -> Float[Array, "T D"]:
        """Dispatches the backward of layers [start, stop), which adds their gradients to the pool.

        Args:
            run: `StepFunctions.backward_slice` for these layers.
            start, stop: The layers.
            kept: What the forward kept for them.
            dx: [T, D] gradient of the last layer's output.
            flat: The TrainRows as one int32 buffer on the device.

        Returns:
            Gradient of the first layer's input.
        """
        layers, pages = self.params["layers"][start:stop], self.pages.cut(start, stop)
        dx, new = run(layers, pages, kept, dx, self.grads.cut(start, stop), jnp.int32(start), flat)
        self.grads = self.grads.spliced(start, new)
        return dx

    def apply_optimizer(
        self,
        run: Callable[..., Any],
        master: LoraWeights,
        opt_state: Any,
        grad_page_ids: Sequence[int],
        page_ids: Sequence[int],
        *numbers: Any,
    ) -> tuple[LoraWeights, Any, dict[str, Array]]:
        """Dispatches one job's optimizer step: writes the new cast to its pages and zeroes its accumulators.

        Args:
            run: `train.optimizer.build_optimizer_step`, compiled or not.
            master, opt_state: The job's own; donated.
            grad_page_ids, page_ids: Its pages in the gradient pool, and the adapter pages to write.
            *numbers: denom, max_grad_norm and hyperparameters.

        Returns:
            (master, opt_state, metrics).
        """
        ids = np.asarray(grad_page_ids, np.int32), np.asarray(page_ids, np.int32)
        outs = run(master, opt_state, self.grads, self.pages, *ids, *numbers)
        master, opt_state, self.grads, self.pages, metrics = outs
        return master, opt_state, metrics


def new_state(
    spec: DecoderSpec, cfg: EngineConfig, params: Params, executables: Executables = NOWHERE
) -> DeviceState:
    """Allocates the state of an engine; `params` is kept by reference.

    Args:
        spec, cfg, params: The engine's.
        executables: Where the function is kept that makes the zeros, hundreds of arrays.
    """
    dtype = jnp.dtype(cfg.dtype)

    def zeros() -> dict[str, Any]:
        return {
            "pages": AdapterPages.empty(spec, cfg.adapter_pages, dtype),
            "grads": AdapterPages.empty(spec, cfg.train_pages + 1, jnp.float32),
            "kv": [KVCache.empty(spec, cfg, dtype) for _ in range(spec.num_hidden_layers)],
            "slots": empty_slots(cfg.max_num_seqs, spec.vocab_size),
        }

    key = ("zeros", compile_key(spec, cfg))
    make = executables.get(key, lambda: (jax.jit(zeros).lower(), {}))
    return DeviceState(params=params, **make())


def head_params(params: Params) -> Params:
    """The parameters that turn hidden states into logits."""
    return {name: params[name] for name in ("norm", "lm_head", "embed_tokens") if name in params}
