"""Attention of rows over gathered keys, with results whose bits depend only on the row.

On XLA CPU in float32, a row's result is bit-identical regardless of how many rows, units or masked keys share the call
and of where its keys start. As measured on jax 0.10.2 and 0.11.2 and checked by tests, this needs five things:

- dots are plain batched matrix products with at least two rows (a single row takes a matrix-vector path with another
  order of summation) and a number of keys that is a multiple of 16 (others change the path of Q K^T);
- the softmax denominator is a dot with ones: the grouping of a reduction depends on its length, while a dot adds keys
  one by one, so that masked keys, which add exact zeros, change nothing;
- P V takes at most 64 columns at a time, a multiple of 16: wider dots split the sum over keys;
- exp never runs on a small array: below 4096 elements jax 0.10.2 compiles a different exp, one ulp apart;
- the stages are fenced, so that multiply-adds are not contracted in some calls and not in others.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

KEY_ALIGN = 64  # callers pad the key axis to a multiple of this; 16 suffices where measured, 64 is safer
MIN_ROWS = 8
MIN_SCORES = 8192  # elements of a score matrix
COLUMNS = 64
MASKED = -1e30


def attend_rows(
    q: Float[Array, "U R N H"],
    k: Float[Array, "U T K H"],
    v: Float[Array, "U T K H"],
    mask: Bool[Array, "U R T"],
    *,
    scale: float,
) -> Float[Array, "U R N H"]:
    """softmax(scale * q k^T, where mask) v for independent units, in float32.

    Query head n reads kv head n // (N / K). Differentiable in q, k and v.

    Args:
        q: R query rows of each of U units.
        k: Keys; without gradients, masked keys may be anything, including NaN.
        v: Values; must be finite where any row of the unit masks them (0 * NaN is NaN).
        mask: Whether a row sees a key.
        scale: Factor of the scores, multiplied into q.

    Returns:
        float32; rows that see no key are 0.
    """
    units, rows, heads, dim = q.shape
    kv_heads, keys = k.shape[2], k.shape[1]
    group = heads // kv_heads
    count = rows * group
    least = max(MIN_ROWS, -(-MIN_SCORES // (units * kv_heads * keys)))
    padding = ((0, 0), (0, max(0, least - count)), (0, 0))

    def per_head(x: Array) -> Array:
        return jnp.moveaxis(x.astype(jnp.float32), 2, 1).reshape(units * kv_heads, keys, dim)

    scaled = (q.astype(jnp.float32) * scale).reshape(units, rows, kv_heads, group, dim)
    queries = jnp.pad(jnp.moveaxis(scaled, 1, 3).reshape(units * kv_heads, count, dim), padding)
    seen = jnp.broadcast_to(mask[:, None, None], (units, kv_heads, group, rows, keys))
    seen = jnp.pad(seen.reshape(units * kv_heads, count, keys), padding)
    total = _softmax_mix(queries, per_head(k), per_head(v), seen)[:, :count]
    return jnp.moveaxis(total.reshape(units, kv_heads, group, rows, dim), 3, 1).reshape(q.shape)


def _softmax_mix(
    q: Float[Array, "B M H"], k: Float[Array, "B T H"], v: Float[Array, "B T H"], seen: Bool[Array, "B M T"]
) -> Float[Array, "B M H"]:
    """The four fenced stages: scores, weights, sums, quotient."""
    fence = lax.optimization_barrier
    q, k, v = fence((q, k, v))
    scores = fence(_dot("bmh,bth->bmt", q, k))
    scores = jnp.where(seen, scores, MASKED)
    top = lax.stop_gradient(fence(scores.max(-1, keepdims=True)))
    weights = fence(jnp.where(seen, jnp.exp(scores - top), 0.0))
    ones = jnp.ones((*k.shape[:2], 16), jnp.float32)
    denominator = fence(_dot("bmt,bth->bmh", weights, ones))[..., :1]
    pieces = []
    for start in range(0, v.shape[-1], COLUMNS):
        piece = v[..., start : start + COLUMNS]
        width = piece.shape[-1]
        piece = jnp.pad(piece, ((0, 0), (0, 0), (0, -width % 16)))
        pieces.append(fence(_dot("bmt,bth->bmh", weights, piece))[..., :width])
    mixed = jnp.concatenate(pieces, -1) if len(pieces) > 1 else pieces[0]
    return mixed / jnp.where(denominator == 0, 1.0, denominator)


def _dot(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, precision=jax.lax.Precision.HIGHEST)
