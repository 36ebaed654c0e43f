"""The arrays of an engine, each with exactly one owner."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from loquetier_jax.adapters.pages import empty_pages
from loquetier_jax.config import EngineConfig
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.step.forward import Cache, Pages, Params
from loquetier_jax.step.sample import SlotState, empty_slots


@dataclass
class DeviceState:
    """Everything on the device that outlives a step. Donated arrays are replaced here and nowhere else kept.

    Attributes:
        params: The frozen base: never donated.
        pages: Adapter pages [P, ...] per layer and group, compute dtype; page 0 is zeros.
        grads: Gradient pool [TP + 1, ...], f32; page 0 is trash.
        kv: Per layer (k_pages, v_pages) [pages, page_size, K, H]; page 0 is trash.
        slots: Per-request state, see SlotState.
    """

    params: Params
    pages: Pages
    grads: Pages
    kv: Cache
    slots: SlotState


def new_state(spec: DecoderSpec, cfg: EngineConfig, params: Params) -> DeviceState:
    """Allocates the state of an engine around `params` (kept by reference)."""
    dtype = jnp.dtype(cfg.dtype)
    page = (cfg.kv_pages, cfg.kv_page_size, spec.num_key_value_heads, spec.head_dim)
    return DeviceState(
        params=params,
        pages=empty_pages(spec, cfg.adapter_pages, dtype),
        grads=empty_pages(spec, cfg.train_pages + 1, jnp.float32),
        kv=[(jnp.zeros(page, dtype), jnp.zeros(page, dtype)) for _ in range(spec.num_hidden_layers)],
        slots=empty_slots(cfg.max_num_seqs, spec.vocab_size),
    )


def head_params(params: Params) -> Params:
    """The leaves that turn hidden states into logits: a sliced step needs only these besides its layers."""
    return {name: params[name] for name in ("norm", "lm_head", "embed_tokens") if name in params}


def take_layers(tree: list, start: int, stop: int) -> list:
    """Entries [start, stop) of a per-layer list, by reference."""
    return tree[start:stop]


def nbytes(tree: object) -> int:
    """Bytes of all arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
