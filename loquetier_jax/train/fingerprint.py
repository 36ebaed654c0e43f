"""Identifies the base that a checkpoint belongs to, by a hash of its architecture and weights."""

import hashlib
import json
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt

from loquetier_jax.models.spec import DecoderSpec


def base_fingerprint(spec: DecoderSpec, params: Any) -> str:
    """Hash of a base model, which is the same on every device because it uses integer sums.

    Reads each weight once, on the device. Distinguishes bases, but is not cryptographically secure.

    Args:
        spec: The architecture.
        params: Its weights, float32, bfloat16 or float16; not modified.

    Returns:
        A sha256 in hex.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sums = jax.device_get([_checksum(leaf) for _, leaf in leaves])
    entries = [
        [_name(path), list(leaf.shape), str(leaf.dtype), int(total)]
        for (path, leaf), total in zip(leaves, sums, strict=True)
    ]
    text = json.dumps([asdict(spec), entries], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _name(path: tuple[Any, ...]) -> str:
    """A weight's path; those of a Dense are named as plain arrays, so that hashes do not depend on the classes."""
    *above, last = path
    if isinstance(last, jax.tree_util.GetAttrKey):
        key = above.pop().key
        last = jax.tree_util.DictKey(key if last.name == "w" else key.replace("_proj", "_bias"))
    return jax.tree_util.keystr((*above, last))


@jax.jit
def _checksum(x: Float[Array, "*shape"]) -> UInt[Array, ""]:
    """Sum modulo 2**32 of each element's bits times an odd number that depends on its position."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32 if x.dtype.itemsize == 4 else jnp.uint16).astype(
        jnp.uint32
    )
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return (bits * (place * jnp.uint32(2) + jnp.uint32(1))).sum(dtype=jnp.uint32)
