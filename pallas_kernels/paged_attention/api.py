"""The public op: validation and choice of implementation."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.common.checks import check_dtype, check_rank
from pallas_kernels.common.implementation import choose
from pallas_kernels.paged_attention.plan import AttentionPlan
from pallas_kernels.paged_attention.triton import MAX_HEAD_DIM, paged_attention_triton, supports_triton
from pallas_kernels.paged_attention.xla import paged_attention_xla


def paged_attention(
    q: Float[Array, "T N H"],
    k_pages: Float[Array, "P S K H"],
    v_pages: Float[Array, "P S K H"],
    plan: AttentionPlan,
    *,
    block_rows: int,
    scale: float,
    window: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "T N H"]:
    """Causal attention of query rows over a paged KV cache, for prefill chunks and decode rows.

    Each block of `block_rows` rows belongs to one sequence; see AttentionPlan for which keys a row sees. Softmax and
    sums are float32. Keys and values that no row of a block sees (a page's unused tail, page 0) may be anything,
    including NaN. Deliberately not differentiable: train rows use `pack_attention`.

    Args:
        q: Query rows, bfloat16, float16 or float32; N is a multiple of K.
        k_pages: Keys of one layer, q's dtype; S positions per page.
        v_pages: Values, likewise.
        plan: Work list of T / block_rows blocks.
        block_rows: Rows per block: 1 for decode, 16 for prefill.
        scale: Factor of the scores, usually H ** -0.5.
        window: A row at position p sees keys p - window < t <= p; None means all keys up to p.
        implementation: "xla", "triton", or None for triton on a GPU if it supports H, else xla.

    Returns:
        Attention output in q's dtype; 0 in rows beyond a block's length.

    Raises:
        ValueError: shapes disagree, or an argument is out of range or unknown.
        TypeError: dtypes disagree.
        NotImplementedError: the named implementation does not support this case.
    """
    _check_arrays(q, k_pages, v_pages)
    plan.check(q.shape[0], block_rows)
    if window is not None and window < 1:
        raise ValueError(f"window: got {window}, expected None or at least 1")
    if q.shape[0] == 0:
        return q
    choice = _choose(implementation, q.shape[2])
    function = paged_attention_triton if choice == "triton" else paged_attention_xla
    plan = jax.tree.map(jnp.asarray, plan)
    return function(q, k_pages, v_pages, plan, block_rows=block_rows, scale=scale, window=window)


def _choose(implementation: str | None, head_dim: int) -> str:
    choice, able = choose(implementation), supports_triton(head_dim)
    if choice == "triton" and not able and implementation is not None:
        raise NotImplementedError(
            f"implementation: got 'triton' with head_dim {head_dim}, expected a multiple of 8 from 16 to {MAX_HEAD_DIM}"
        )
    return choice if able else "xla"


def _check_arrays(q: Any, k_pages: Any, v_pages: Any) -> None:
    for name, array, rank in (("q", q, 3), ("k_pages", k_pages, 4), ("v_pages", v_pages, 4)):
        check_rank(name, array, rank)
        check_dtype(name, array, "q", q.dtype)
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise TypeError(f"q: got dtype {q.dtype}, expected a floating-point dtype")
    if k_pages.shape != v_pages.shape:
        raise ValueError(f"v_pages: got shape {v_pages.shape}, expected k_pages' {k_pages.shape}")
    if k_pages.shape[3] != q.shape[2]:
        raise ValueError(f"k_pages: got head_dim {k_pages.shape[3]}, expected q's {q.shape[2]}")
    if k_pages.shape[2] == 0 or q.shape[1] % k_pages.shape[2]:
        raise ValueError(f"q: got {q.shape[1]} heads, expected a multiple of k_pages' {k_pages.shape[2]}")
