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
    """Every row attends to the earlier rows of its own sample, itself included. Packs share nothing.

    The XLA form computes in float32, pack by pack, some queries at a time, and recomputes the scores in its
    transpose: its memory does not grow with G nor with L squared. On CPU in float32 a row has the very bits that
    `paged_attention(implementation="xla")` gives it, wherever its sample lies in the pack.

    Args:
        q, k, v: Rotated queries and keys, and values; N is a multiple of K, L of PACK_ALIGN.
        positions, segments: Of the rows; rows of equal segment are one sample (-1: padding, which sees padding), and
            within a sample positions rise with the row.
        scale: Factor of the scores.
        window: Keys a row sees, itself included; None for all.
        implementation: "xla", "cudnn" (bfloat16 and float16, H a multiple of 8) or None: cudnn on a GPU that can, else
            xla. Before jax 0.11 cuDNN's transpose also computes a gradient of the mask, which nobody reads.

    Returns:
        In the dtype of q. Differentiable in q, k and v.

    Raises:
        ValueError: Shapes disagree, or the implementation or window is unknown.
        NotImplementedError: cudnn was named and cannot take this dtype or head size.
    """
    _check(q, k, v, positions, segments, window)
    if _choose(implementation, q) == "cudnn":
        mask = pack_mask(positions, segments, positions, segments, window)[:, None]
        # Causal as well: cuDNN then skips the tiles above the diagonal.
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
    """Largest head cuDNN takes: 256 from Hopper on."""
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
