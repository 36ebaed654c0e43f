"""LoRA of training packs: every pack is of one adapter, so the op is a batched product. Differentiable."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pallas_kernels.smlm.pack_triton import pack_backward
from pallas_kernels.smlm.plan import RANK_PAGE

F32 = jnp.float32
IMPLEMENTATIONS = ("xla", "triton")


def pack_lora(
    x: Float[Array, "G L in"],
    A: Float[Array, "G MP nR in"],
    B: Float[Array, "G MP R out"],
    out_features: tuple[int, ...],
    *,
    implementation: str | None = None,
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
        implementation: Of the backward: "xla", "triton", or None for triton on a GPU and xla elsewhere. The
            forward is XLA's: training runs it in `smlm` and only its transpose here.

    Returns:
        The delta in x's dtype.

    Raises:
        ValueError: shapes disagree, or the implementation is unknown; both values are named.
    """
    if implementation is None:
        implementation = "triton" if jax.default_backend() == "gpu" else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: got {implementation!r}, expected one of {IMPLEMENTATIONS} or None")
    G, _, size = x.shape
    want_A = (G, A.shape[1], len(out_features) * RANK_PAGE, size)
    want_B = (G, A.shape[1], RANK_PAGE, sum(out_features))
    if A.shape != want_A or B.shape != want_B:
        raise ValueError(
            f"A, B: got shapes {A.shape}, {B.shape}, expected {want_A}, {want_B} "
            f"for x {x.shape} and out_features {out_features}"
        )
    return _pack_lora(x, A, B, tuple(out_features), implementation)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _pack_lora(x: Array, A: Array, B: Array, out_features: tuple[int, ...], implementation: str) -> Array:
    return _forward(x, A, B, out_features, implementation)[0]


def _blocks(out_features: tuple[int, ...]) -> Bool[np.ndarray, "n 1 out"]:
    """Which columns of the fused output belong to which target."""
    owner = np.repeat(np.arange(len(out_features)), out_features)
    return (np.arange(len(out_features))[:, None] == owner)[:, None]


def _spread(B: Float[Array, "G MP R out"], out_features: tuple[int, ...]) -> Float[Array, "G MP nR out"]:
    """B as one block-diagonal matrix over the stacked ranks: one product serves all targets, and dY is never cut."""
    G, M, R, out = B.shape
    spread = jnp.where(_blocks(out_features), B[:, :, None], jnp.zeros((), B.dtype))
    return spread.reshape(G, M, len(out_features) * R, out)


def _forward(
    x: Array, A: Array, B: Array, out_features: tuple[int, ...], implementation: str
) -> tuple[Array, tuple[Array, ...]]:
    a, b = A.astype(x.dtype), _spread(B.astype(x.dtype), out_features)
    S = jnp.einsum("gli,gmri->glmr", x, a, preferred_element_type=F32).astype(x.dtype)
    # The product is summed in float32 and rounded once to x's dtype.
    return jnp.einsum("glmr,gmro->glo", S, b, preferred_element_type=x.dtype), (x, A, B, S)


def pack_backward_xla(
    x: Float[Array, "G L in"],
    A: Float[Array, "G MP nR in"],
    B: Float[Array, "G MP R out"],
    S: Float[Array, "G L MP nR"],
    dy: Float[Array, "G L out"],
    out_features: tuple[int, ...],
) -> tuple[Array, Array, Array]:
    """dS = dY B^T, dX = dS A, dA = dS^T X, dB = S^T dY: the transpose of `_forward`, sums in float32.

    Args and result are those of `pack_triton.pack_backward`.
    """
    a, b, dy = A.astype(x.dtype), _spread(B.astype(x.dtype), out_features), dy.astype(x.dtype)
    dS = jnp.einsum("glo,gmro->glmr", dy, b, preferred_element_type=F32).astype(x.dtype)
    dx = jnp.einsum("glmr,gmri->gli", dS, a, preferred_element_type=x.dtype)
    dA = jnp.einsum("glmr,gli->gmri", dS, x, preferred_element_type=F32)
    dB = jnp.einsum("glmr,glo->gmro", S, dy, preferred_element_type=F32)
    dB = dB.reshape(*B.shape[:2], len(out_features), *B.shape[2:])
    dB = jnp.where(_blocks(out_features), dB, jnp.zeros((), F32)).sum(axis=2)
    return dx, dA.astype(A.dtype), dB.astype(B.dtype)


def _backward(
    out_features: tuple[int, ...], implementation: str, kept: tuple[Array, ...], dy: Array
) -> tuple[Array, Array, Array]:
    function = pack_backward if implementation == "triton" else pack_backward_xla
    return function(*kept, dy, out_features)


_pack_lora.defvjp(_forward, _backward)
