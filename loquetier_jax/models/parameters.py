"""The parameter tree: shape, logical axes and checkpoint tensors of every leaf, from one table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from jax.sharding import Mesh, PartitionSpec

from loquetier_jax.errors import ModelError
from loquetier_jax.models.spec import BIASES, GROUPS, MODULES, DecoderSpec

Tree = Any
Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]

AXES: dict[str, tuple[str, str]] = {
    "qkv_proj": ("embed", "qkv"),
    "o_proj": ("heads", "embed"),
    "gate_up_proj": ("embed", "gate_up"),
    "down_proj": ("mlp", "embed"),
}
"""Group -> logical names of its (input, output) axes."""

TENSOR_PARALLEL: Rules = (
    ("vocab", "model"),
    ("qkv", "model"),
    ("heads", "model"),
    ("gate_up", "model"),
    ("mlp", "model"),
    ("embed", None),
    ("norm", None),
)
"""Megatron's split over a mesh axis "model": columns of the first projection of a pair, rows of the next."""


@dataclass(frozen=True)
class Parameter:
    """One leaf of the parameter tree.

    Attributes:
        kind: "embedding", "matrix" (transposed in the checkpoint: torch keeps (out, in)), "norm" or "bias".
        shape: Shape of the leaf.
        axes: Logical name of each axis.
        tensors: Name and shape of the checkpoint tensors that make it up, in order along the output.
    """

    kind: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    tensors: tuple[tuple[str, tuple[int, ...]], ...]


def param_table(spec: DecoderSpec) -> Tree:
    """The parameter tree with a `Parameter` at every leaf.

    {"embed_tokens": [V, D], "norm": [D], "lm_head"?: [D, V] (absent when tied), "layers": [
        {"input_layernorm": [D], "qkv_proj": [D, (N+2K)H], "q_norm"?: [H], "k_norm"?: [H], "o_proj": [NH, D],
        "post_attention_layernorm": [D], "gate_up_proj": [D, 2F], "down_proj": [F, D],
        "qkv_bias"?: [(N+2K)H], "o_bias"?: [D], "gate_up_bias"?: [2F], "down_bias"?: [D]} x L]}
    """
    vocab, width = spec.vocab_size, spec.hidden_size
    embedding = (("model.embed_tokens.weight", (vocab, width)),)
    table = {
        "embed_tokens": Parameter("embedding", (vocab, width), ("vocab", "embed"), embedding),
        "layers": [_layer_table(spec, f"model.layers.{i}.") for i in range(spec.num_hidden_layers)],
        "norm": _norm("model.norm", width, "embed"),
    }
    if not spec.tie_word_embeddings:
        head = (("lm_head.weight", (vocab, width)),)
        table["lm_head"] = Parameter("matrix", (width, vocab), ("embed", "vocab"), head)
    return table


def _norm(path: str, width: int, axis: str) -> Parameter:
    return Parameter("norm", (width,), (axis,), ((f"{path}.weight", (width,)),))


def _layer_table(spec: DecoderSpec, prefix: str) -> dict[str, Parameter]:
    names = ("input_layernorm", "post_attention_layernorm")
    table = {name: _norm(prefix + name, spec.hidden_size, "embed") for name in names}
    if spec.qk_norm:
        for name in ("q_norm", "k_norm"):
            table[name] = _norm(f"{prefix}self_attn.{name}", spec.head_dim, "norm")
    for group, (inputs, outputs) in spec.group_shapes.items():
        paths = [prefix + MODULES[target] for target in GROUPS[group]]
        weights = tuple((f"{p}.weight", (out, inputs)) for p, out in zip(paths, outputs, strict=True))
        table[group] = Parameter("matrix", (inputs, sum(outputs)), AXES[group], weights)
        if spec.has_bias(group):
            biases = tuple((f"{p}.bias", (out,)) for p, out in zip(paths, outputs, strict=True))
            table[BIASES[group]] = Parameter("bias", (sum(outputs),), AXES[group][1:], biases)
    return table


def param_shapes(spec: DecoderSpec, dtype: jnp.dtype | str) -> Tree:
    """The parameter tree with a `jax.ShapeDtypeStruct` at every leaf."""
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.dtype(dtype)), param_table(spec))


def param_axes(spec: DecoderSpec) -> Tree:
    """The parameter tree with a `PartitionSpec` of logical axis names at every leaf.

    Names: vocab, embed (D), qkv, heads (N * H), gate_up (2F), mlp (F), norm (H). Flax's logical axis rules
    (`flax.linen.logical_to_mesh_sharding`) take the tree as it is.
    """
    return jax.tree.map(lambda p: PartitionSpec(*p.axes), param_table(spec))


def shardings(spec: DecoderSpec, mesh: Mesh, rules: Rules = TENSOR_PARALLEL) -> Tree:
    """The parameter tree with a `NamedSharding` at every leaf.

    Args:
        spec: Architecture.
        mesh: Devices.
        rules: (logical axis, mesh axis or None) pairs, flax's logical axis rules.

    Raises:
        ModelError: a parameter does not divide evenly over the mesh, or a rule names an axis the mesh lacks.
    """
    named = [axis for _, to in rules for axis in ((to,) if isinstance(to, str) else to or ())]
    for axis in named:
        if axis not in mesh.shape:
            raise ModelError(f"rules: mesh axis {axis!r} is unknown, the mesh has {tuple(mesh.shape)}")
    tree = linen.logical_to_mesh_sharding(param_axes(spec), mesh, rules)
    for parameter, sharding in zip(jax.tree.leaves(param_table(spec)), jax.tree.leaves(tree), strict=True):
        try:
            sharding.shard_shape(parameter.shape)
        except ValueError as error:
            name = parameter.tensors[0][0]
            raise ModelError(f"{name}: shape {parameter.shape} cannot be split as {sharding.spec}") from error
    return tree
