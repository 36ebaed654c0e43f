"""The public op: validation and choice of implementation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.pack_attention.xla import PACK_ALIGN, pack_attention_xla, pack_mask

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
    """Causal attention inside packs: every row attends to itself and the earlier rows of its own sample.

    The XLA implementation computes in float32, pack by pack, a block of queries at a time, and recomputes the scores in
    its backward: its memory grows neither with G nor with L squared. On CPU in float32, a row has the same bits as with
    `paged_attention(implementation="xla")`, wherever its sample is in the pack.

    Args:
        q, k, v: Rotated queries and keys, and values; N is a multiple of K, L of PACK_ALIGN.
        positions, segments: Rows with equal segments are one sample (-1 is padding, which attends to padding);
            positions increase within a sample.
        scale: Factor of the scores.
        window: Number of keys that a row sees, including itself; None for all.
        implementation: "xla", "cudnn" (bfloat16 and float16, H a multiple of 8) or None for cudnn on a GPU if
            supported, else xla. Before jax 0.11, cuDNN's backward also computes an unused gradient of the mask.

    Returns:
        The attention output in q's dtype; differentiable in q, k and v.

    Raises:
        ValueError: shapes disagree, or the implementation or window is invalid.
        NotImplementedError: cudnn was named but does not support this dtype or head size.
    """
    _check(q, k, v, positions, segments, window)
    if _choose(implementation, q) == "cudnn":
        mask = pack_mask(positions, segments, positions, segments, window)[:, None]
        # is_causal is redundant but lets cuDNN skip the tiles above the diagonal.
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, scale=scale, is_causal=True, implementation="cudnn"
        )
    return pack_attention_xla(q, k, v, positions, segments, scale=scale, window=window)


def _choose(implementation: str | None, q: Array) -> str:
    if implementation not in (None, "xla", "cudnn"):
        raise ValueError(f"implementation: got {implementation!r}, expected 'xla', 'cudnn' or None")
    able = q.dtype in CUDNN_DTYPES and q.shape[3] % 8 == 0 and q.shape[3] <= _cudnn_head_dim()
    if implementation == "cudnn" and not able:
        raise NotImplementedError(
            f"implementation: got 'cudnn' with {q.dtype} and head_dim {q.shape[3]}, expected bfloat16 or float16 and a "
            f"multiple of 8 up to {_cudnn_head_dim()}"
        )
    return implementation or ("cudnn" if able and jax.default_backend() == "gpu" else "xla")


def _cudnn_head_dim() -> int:
    """Largest head size that cuDNN supports: 256 from Hopper on, else 128."""
    if jax.default_backend() != "gpu":
        return 256
    return 256 if float(jax.local_devices()[0].compute_capability) >= 9.0 else 128


def _check(q: Array, k: Array, v: Array, positions: Array, segments: Array, window: int | None) -> None:
    if q.ndim != 4 or q.shape[1] % PACK_ALIGN or 0 in q.shape:
        raise ValueError(f"q: got shape {q.shape}, expected [G, L, N, H] with L a multiple of {PACK_ALIGN}")
    if k.ndim != 4 or k.shape != (*q.shape[:2], k.shape[2], q.shape[3]) or q.shape[2] % k.shape[2]:
        raise ValueError(f"k: got shape {k.shape}, expected [G, L, K, H] with N a multiple of K; q is {q.shape}")
    if v.shape != k.shape:
        raise ValueError(f"v: got shape {v.shape}, expected k's {k.shape}")
    for name, array in (("positions", positions), ("segments", segments)):
        if array.shape != q.shape[:2]:
            raise ValueError(f"{name}: got shape {array.shape}, expected {q.shape[:2]}")
    if window is not None and window < 1:
        raise ValueError(f"window: got {window}, expected None or at least 1")
