"""Causal attention inside packs: the train and score rows of a step."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from pallas_kernels import attend_rows

CUDNN_DTYPES = (jnp.bfloat16, jnp.float16)


def pack_attention(
    q: Float[Array, "G L N H"],
    k: Float[Array, "G L K H"],
    v: Float[Array, "G L K H"],
    positions: Int[Array, "G L"],
    segments: Int[Array, "G L"],
    *,
    scale: float,
    window: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "G L N H"]:
    """Every row attends to the earlier rows of its own sample, itself included. Packs share nothing.

    Args:
        q, k, v: Rotated queries and keys, and values; N is a multiple of K.
        positions, segments: Of the rows; rows of equal segment are one sample (-1: padding, which sees padding).
        scale: Of the scores.
        window: Keys a row sees, itself included; None for all.
        implementation: "xla" (float32 inside; on CPU in float32 bit for bit what paged attention gives), "cudnn"
            (bfloat16, float16), None for cudnn where it can.

    Returns:
        In the dtype of q. Differentiable.

    Raises:
        ValueError: an unknown implementation.
        NotImplementedError: cudnn was named and cannot take this dtype.
    """
    if implementation not in (None, "xla", "cudnn"):
        raise ValueError(f"implementation: got {implementation!r}, expected 'xla', 'cudnn' or None")
    able = q.dtype in CUDNN_DTYPES
    if implementation == "cudnn" and not able:
        raise NotImplementedError(f"implementation: got 'cudnn' with {q.dtype}, expected bfloat16 or float16")
    mask = pack_mask(positions, segments, window)
    if implementation == "cudnn" or (implementation is None and able and jax.default_backend() == "gpu"):
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale, implementation="cudnn")
    return attend_rows(q, k, v, mask, scale=scale).astype(q.dtype)


def pack_mask(positions: Int[Array, "G L"], segments: Int[Array, "G L"], window: int | None) -> Bool[Array, "G L L"]:
    """[g, i, j]: whether row i of pack g sees row j."""
    distance = positions[:, :, None] - positions[:, None, :]
    seen = (segments[:, :, None] == segments[:, None, :]) & (distance >= 0)
    return seen if window is None else seen & (distance < window)
