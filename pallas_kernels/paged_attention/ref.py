"""The reference definition of paged attention: row by row, float32, plain jnp."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.paged_attention.plan import AttentionPlan


def paged_attention_ref(
    q: Float[Array, "T N H"],
    k_pages: Float[Array, "P S K H"],
    v_pages: Float[Array, "P S K H"],
    plan: AttentionPlan,
    *,
    block_rows: int,
    scale: float,
    window: int | None = None,
) -> Float[Array, "T N H"]:
    """out[t] = sum of softmax(scale * q[t] . k) v over the keys that row t sees; see AttentionPlan.

    Gathers a whole table of keys per row, so only for tests and small sizes. Unused rows are 0; returns q's dtype.
    """
    rows, heads, _ = q.shape
    group = heads // k_pages.shape[2]
    block, offset = jnp.arange(rows) // block_rows, jnp.arange(rows) % block_rows
    position = plan.block_pos[block] + offset
    valid = offset < plan.block_len[block]
    pages = plan.tables[plan.block_seq[block]]

    def keys(cache: Array) -> Array:
        own = cache[pages].reshape(rows, -1, *cache.shape[2:])
        return jnp.repeat(own.astype(jnp.float32), group, axis=2)

    k, v = keys(k_pages), keys(v_pages)
    t = jnp.arange(k.shape[1])[None]
    seen = (t <= position[:, None]) & valid[:, None]
    if window is not None:
        seen &= t > position[:, None] - window
    scores = jnp.einsum("tnh,tsnh->tns", q.astype(jnp.float32) * scale, k)
    # -1e30 instead of -inf, so that a row that sees no keys has zero weights rather than NaN.
    weights = jnp.where(seen[:, None], jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30), axis=-1), 0.0)
    out = jnp.einsum("tns,tsnh->tnh", weights, jnp.where(seen[:, :, None, None], v, 0.0))
    return out.astype(q.dtype)
