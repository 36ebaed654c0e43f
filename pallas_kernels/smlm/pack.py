"""LoRA of training packs: every pack is of one adapter, so the op is a batched product. Differentiable."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.smlm.plan import RANK_PAGE

F32 = jnp.float32


def pack_lora(
    x: Float[Array, "G L in"],
    A: Float[Array, "G MP nR in"],
    B: Float[Array, "G MP R out"],
    out_features: tuple[int, ...],
) -> Float[Array, "G L out"]:
    """The LoRA delta of G packs of L rows, pack g under the adapter whose pages are A[g], B[g].

    Products take operands in x's dtype and sum in float32. Cotangents of A and B have the dtype that A and B
    came in: pass float32 pages (a bfloat16 page cast to float32 computes the same values) to get gradients
    that were never rounded. Packs never mix: the products are batched over g.

    Args:
        x: Inputs; dropout, where there is any, already applied.
        A: Pages of the n stacked targets; absent pages are zero.
        B: Pages with scaling folded in; absent pages are zero.
        out_features: Columns of each target.

    Returns:
        The delta in x's dtype.

    Raises:
        ValueError: shapes disagree; both values are named.
    """
    G, _, size = x.shape
    want_A = (G, A.shape[1], len(out_features) * RANK_PAGE, size)
    want_B = (G, A.shape[1], RANK_PAGE, sum(out_features))
    if A.shape != want_A or B.shape != want_B:
        raise ValueError(
            f"A, B: got shapes {A.shape}, {B.shape}, expected {want_A}, {want_B} "
            f"for x {x.shape} and out_features {out_features}"
        )
    return _pack_lora(x, A, B, tuple(out_features))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _pack_lora(x: Array, A: Array, B: Array, out_features: tuple[int, ...]) -> Array:
    return _forward(x, A, B, out_features)[0]


def _columns(out_features: tuple[int, ...]) -> list[tuple[slice, slice]]:
    """(ranks, columns) of each target in the stacked A and the fused output."""
    starts = [sum(out_features[:i]) for i in range(len(out_features))]
    return [
        (slice(i * RANK_PAGE, (i + 1) * RANK_PAGE), slice(start, start + size))
        for i, (start, size) in enumerate(zip(starts, out_features, strict=True))
    ]


def _forward(x: Array, A: Array, B: Array, out_features: tuple[int, ...]) -> tuple[Array, tuple[Array, ...]]:
    a, b = A.astype(x.dtype), B.astype(x.dtype)
    S = jnp.einsum("gli,gmri->glmr", x, a, preferred_element_type=F32).astype(x.dtype)
    deltas = [
        jnp.einsum("glmr,gmro->glo", S[..., ranks], b[..., cols], preferred_element_type=F32)
        for ranks, cols in _columns(out_features)
    ]
    return jnp.concatenate(deltas, axis=-1).astype(x.dtype), (x, A, B, S)


def _backward(out_features: tuple[int, ...], kept: tuple[Array, ...], dy: Array) -> tuple[Array, ...]:
    """dS = dY B^T, dX = dS A, dA = dS^T X, dB = S^T dY: the transpose of `_forward`, sums in float32."""
    x, A, B, S = kept
    a, b, dy = A.astype(x.dtype), B.astype(x.dtype), dy.astype(x.dtype)
    dS, dB = [], []
    for ranks, cols in _columns(out_features):
        dS.append(jnp.einsum("glo,gmro->glmr", dy[..., cols], b[..., cols], preferred_element_type=F32))
        dB.append(jnp.einsum("glmr,glo->gmro", S[..., ranks], dy[..., cols], preferred_element_type=F32))
    dS = jnp.concatenate(dS, axis=-1).astype(x.dtype)
    dx = jnp.einsum("glmr,gmri->gli", dS, a, preferred_element_type=F32)
    dA = jnp.einsum("glmr,gli->gmri", dS, x, preferred_element_type=F32)
    return dx.astype(x.dtype), dA.astype(A.dtype), jnp.concatenate(dB, axis=-1).astype(B.dtype)


_pack_lora.defvjp(_forward, _backward)
