"""LoRA dropout from a counter-based hash: regenerated in the replay, never stored, independent of batching."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

GROUP_SALT = {
    "qkv_proj": 0x9E3779B9,
    "o_proj": 0x85EBCA6B,
    "gate_up_proj": 0xC2B2AE35,
    "down_proj": 0x27D4EB2F,
}


def _mix(h: UInt[Array, "*s"]) -> UInt[Array, "*s"]:
    """murmur3's finalizer: every input bit affects every output bit."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def dropout(
    x: Float[Array, "T D"],
    keys: UInt[Array, " T"],
    rates: Float[Array, " T"],
    layer: Int[Array, ""],
    group: str,
) -> Float[Array, "T D"]:
    """Inverted dropout of a projection group's adapter input (like PEFT, which drops only the adapter's input).

    Args:
        x: Adapter input, train rows only.
        keys: Hash of (job seed, optimizer step, sample, position) per row.
        rates: Drop probability per row; rows with rate 0 are returned bit for bit.
        layer: Index of the layer, traced so that slices of layers share a compile.
        group: Projection group; each has its own mask.

    Returns:
        x where kept, divided by 1 - rate; 0 elsewhere.
    """
    row = _mix(keys ^ (layer.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) + jnp.uint32(GROUP_SALT[group])))
    column = jnp.arange(x.shape[1], dtype=jnp.uint32) * jnp.uint32(0x01000193)
    bits = _mix(row[:, None] + column[None, :])
    threshold = (rates * 4294967040.0).astype(
        jnp.uint32
    )  # the largest f32 below 2**32: no overflow at rate -> 1
    scale = (1.0 / (1.0 - rates)).astype(x.dtype)
    return jnp.where(bits >= threshold[:, None], x * scale[:, None], jnp.zeros((), x.dtype))
