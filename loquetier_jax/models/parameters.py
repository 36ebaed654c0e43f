"""The parameter tree: shape and checkpoint tensors of every leaf."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from loquetier_jax.models.linear import Dense
from loquetier_jax.models.spec import GROUPS, MODULES, DecoderSpec

Tree = Any


@dataclass(frozen=True)
class Parameter:
    """One leaf of the parameter tree.

    Attributes:
        kind: "embedding", "matrix" (transposed in the checkpoint: torch stores (out, in)), "norm" or "bias".
        shape: Shape of the leaf.
        tensors: Names and shapes of the checkpoint tensors that it is concatenated from, along the output axis.
    """

    kind: str
    shape: tuple[int, ...]
    tensors: tuple[tuple[str, tuple[int, ...]], ...]


def param_table(spec: DecoderSpec) -> Tree:
    """The parameter tree with a `Parameter` at every leaf.

    {"embed_tokens": [V, D], "norm": [D], "lm_head"?: Dense [D, V] (absent when tied), "layers": [
        {"input_layernorm": [D], "qkv_proj": Dense [D, (N+2K)H], "q_norm"?: [H], "k_norm"?: [H],
        "o_proj": Dense [NH, D], "post_attention_layernorm": [D], "gate_up_proj": Dense [D, 2F],
        "down_proj": Dense [F, D]} x L]}, where a Dense has a bias if `spec.has_bias`.
    """
    vocab, width = spec.vocab_size, spec.hidden_size
    embedding = (("model.embed_tokens.weight", (vocab, width)),)
    table = {
        "embed_tokens": Parameter("embedding", (vocab, width), embedding),
        "layers": [_layer_table(spec, f"model.layers.{i}.") for i in range(spec.num_hidden_layers)],
        "norm": _norm("model.norm", width),
    }
    if not spec.tie_word_embeddings:
        head = (("lm_head.weight", (vocab, width)),)
        table["lm_head"] = Dense(Parameter("matrix", (width, vocab), head))
    return table


def _norm(path: str, width: int) -> Parameter:
    return Parameter("norm", (width,), ((f"{path}.weight", (width,)),))


def _layer_table(spec: DecoderSpec, prefix: str) -> dict[str, Parameter | Dense]:
    names = ("input_layernorm", "post_attention_layernorm")
    table: dict[str, Parameter | Dense] = {name: _norm(prefix + name, spec.hidden_size) for name in names}
    if spec.qk_norm:
        for name in ("q_norm", "k_norm"):
            table[name] = _norm(f"{prefix}self_attn.{name}", spec.head_dim)
    for group, (inputs, outputs) in spec.group_shapes.items():
        paths = [prefix + MODULES[target] for target in GROUPS[group]]
        weights = tuple((f"{p}.weight", (out, inputs)) for p, out in zip(paths, outputs, strict=True))
        biases = tuple((f"{p}.bias", (out,)) for p, out in zip(paths, outputs, strict=True))
        bias = Parameter("bias", (sum(outputs),), biases) if spec.has_bias(group) else None
        table[group] = Dense(Parameter("matrix", (inputs, sum(outputs)), weights), bias)
    return table


def param_shapes(spec: DecoderSpec, dtype: jnp.dtype | str) -> Tree:
    """The parameter tree with a `jax.ShapeDtypeStruct` at every leaf."""
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.dtype(dtype)), param_table(spec))
