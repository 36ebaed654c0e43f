"""Puts base parameters on the device: streamed from a HF folder, or randomly initialised."""

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from loquetier_jax.errors import ModelError
from loquetier_jax.executables import NOWHERE, Executables, Program
from loquetier_jax.models.checkpoint import Checkpoint
from loquetier_jax.models.parameters import Parameter, Tree, param_shapes, param_table
from loquetier_jax.models.spec import DecoderSpec

__all__ = ["init_random", "load_hf", "open_hf", "param_shapes"]

log = logging.getLogger(__name__)

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_ROTARY_BUFFERS = "rotary_emb.inv_freq"  # written by transformers before 4.32; recomputed here


def load_hf(
    folder: str | os.PathLike[str], dtype: jnp.dtype | str | None = None, executables: Executables = NOWHERE
) -> tuple[DecoderSpec, Tree]:
    """Loads a HF model folder tensor by tensor; the host holds one parameter at a time.

    Everything is checked from the headers before any tensor is read. If the config ties the head to the embedding but
    the files contain a different head, the files win, as in transformers 5: there is a warning, and the returned spec
    has tie_word_embeddings=False. Either name of a tied pair may be missing.

    Args:
        folder: Contains `config.json` and safetensors.
        dtype: float32, bfloat16 or float16; None uses the config's dtype (float32 if it has none).
        executables: Where the functions are kept that transpose and cast.

    Returns:
        (spec, params), params as in `parameters.param_table`.

    Raises:
        ModelError: an unsupported config, or a missing, unexpected, misshapen or unreadable tensor or file (named).
    """
    dtype = None if dtype is None else _compute_dtype(dtype)
    spec, checkpoint = open_hf(folder)
    dtype = dtype or _compute_dtype(spec.dtype or "float32")
    return spec, _place(param_table(spec), lambda p: _load(checkpoint, p, dtype, executables))


def open_hf(folder: str | os.PathLike[str]) -> tuple[DecoderSpec, Checkpoint]:
    """The architecture and tensor index of a HF model folder, checked against each other; reads no tensors.

    Raises:
        ModelError: see `load_hf`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder")
    spec, checkpoint = DecoderSpec.from_hf(folder), Checkpoint(folder)
    tied = spec.tie_word_embeddings
    if tied and HEAD in checkpoint.entries:  # as in transformers 5, the files decide whether they are tied
        if EMBEDDING not in checkpoint.entries:
            checkpoint.rename(HEAD, EMBEDDING)
        else:
            spec = replace(spec, tie_word_embeddings=False)
    expected = {name: shape for p in jax.tree.leaves(param_table(spec)) for name, shape in p.tensors}
    checkpoint.check(expected, harmless=(_ROTARY_BUFFERS,))
    if tied and not spec.tie_word_embeddings:
        if checkpoint.same(HEAD, EMBEDDING):
            del checkpoint.entries[HEAD]
            return replace(spec, tie_word_embeddings=True), checkpoint
        log.warning(
            "%s: config.json sets tie_word_embeddings, but %s differs from %s; loading them as separate matrices. "
            "Set tie_word_embeddings to false to silence this warning",
            checkpoint.folder,
            HEAD,
            EMBEDDING,
        )
    return spec, checkpoint


def init_random(spec: DecoderSpec, key: Array, dtype: jnp.dtype | str = "float32") -> Tree:
    """Random parameters on the device: matrices of variance 1/in, embeddings 1/D, norms neutral, biases zero.

    Args:
        spec: Architecture.
        key: A jax PRNG key; a leaf depends only on it and on the leaf's position in the tree.
        dtype: float32, bfloat16 or float16.

    Raises:
        ModelError: an unsupported dtype.
    """
    dtype = _compute_dtype(dtype)
    table = param_table(spec)
    leaves, structure = jax.tree.flatten(table)
    keys = structure.unflatten([jax.random.fold_in(key, i) for i in range(len(leaves))])
    keyed = jax.tree.map(lambda p, k: (p, k), table, keys)
    neutral = 0.0 if spec.norm_plus_one else 1.0

    def draw(leaf: tuple[Parameter, Array]) -> Array:
        p, k = leaf
        fill = {"norm": neutral, "bias": 0.0}.get(p.kind)
        std = spec.hidden_size**-0.5 if p.kind == "embedding" else p.shape[0] ** -0.5
        return _drawer(p.shape, dtype, fill, std)(k)

    return _place(keyed, draw, is_leaf=lambda leaf: isinstance(leaf, tuple))


def _compute_dtype(dtype: jnp.dtype | str) -> np.dtype:
    known = ("float32", "bfloat16", "float16")
    try:
        resolved = jnp.dtype(dtype)
    except TypeError:
        resolved = None
    if resolved is None or resolved.name not in known:
        raise ModelError(f"dtype: got {dtype!r}, expected one of {known}")
    return resolved


def _place(tree: Tree, make: Callable[..., Array], is_leaf: Callable[[object], bool] | None = None) -> Tree:
    """tree.map(make), with each leaf on the device before the next one is made."""
    return jax.tree.map(lambda leaf: jax.block_until_ready(make(leaf)), tree, is_leaf=is_leaf)


def _load(checkpoint: Checkpoint, parameter: Parameter, dtype: np.dtype, executables: Executables) -> Array:
    parts = [checkpoint.read(name) for name, _ in parameter.tensors]
    if len({part.dtype for part in parts}) > 1:
        parts = [part.astype(dtype) for part in parts]
    # Concatenate in torch's (out, in) layout, a plain copy; the device transposes much faster than the host.
    fused = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return _finisher(fused.shape, fused.dtype, dtype, parameter.kind == "matrix", executables)(jax.device_put(fused))


@functools.cache
def _finisher(
    shape: tuple[int, ...], given: np.dtype, dtype: np.dtype, transpose: bool, executables: Executables
) -> Callable[[Array], Array]:
    def build() -> Program:
        finish = jax.jit(lambda x: (x.T if transpose else x).astype(dtype))
        return finish.lower(jax.ShapeDtypeStruct(shape, given)), {}

    return executables.get(("finish", shape, given.name, dtype.name, transpose), build)


@functools.cache
def _drawer(shape: tuple[int, ...], dtype: np.dtype, fill: float | None, std: float) -> Callable[[Array], Array]:
    def draw(key: Array) -> Array:
        if fill is not None:
            return jnp.full(shape, fill, dtype)
        return (jax.random.normal(key, shape, jnp.float32) * std).astype(dtype)

    return jax.jit(draw)
