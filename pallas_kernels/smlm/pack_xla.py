"""LoRA of packs in plain XLA: every pack has one adapter, so the products are batched.

`expand_packs` computes the delta from a kept S; the backward has two halves, `pack_dy_xla`, which reads dY, and
`pack_x_xla`, which reads x.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

F32 = jnp.float32


def expand_packs(
    S: Float[Array, "G L n MP R"], B: Float[Array, "G MP R out"], out_features: tuple[int, ...]
) -> Float[Array, "G L out"]:
    """The delta S B, accumulated in float32 and rounded once to S's dtype."""
    b = _spread(B.astype(S.dtype), out_features)
    return jnp.einsum("glmr,gmro->glo", _by_page(S), b, preferred_element_type=S.dtype)


def _blocks(out_features: tuple[int, ...]) -> Bool[np.ndarray, "n 1 out"]:
    """Per target, the mask of its columns in the fused output."""
    owner = np.repeat(np.arange(len(out_features)), out_features)
    return (np.arange(len(out_features))[:, None] == owner)[:, None]


def _spread(B: Float[Array, "G MP R out"], out_features: tuple[int, ...]) -> Float[Array, "G MP nR out"]:
    """B as one block-diagonal matrix over the stacked ranks: one product for all targets, without slicing dY."""
    G, M, R, out = B.shape
    spread = jnp.where(_blocks(out_features), B[:, :, None], jnp.zeros((), B.dtype))
    return spread.reshape(G, M, len(out_features) * R, out)


def _by_page(S: Float[Array, "G L n MP R"]) -> Float[Array, "G L MP nR"]:
    """S with its ranks in the order of A's pages."""
    return S.swapaxes(2, 3).reshape(*S.shape[:2], S.shape[3], -1)


def pack_dy_xla(
    B: Float[Array, "G MP R out"],
    S: Float[Array, "G L n MP R"],
    dy: Float[Array, "G L out"],
    out_features: tuple[int, ...],
) -> tuple[Float[Array, "G L MP nR"], Float[Array, "G MP R out"]]:
    """dS = dY B^T and dB = S^T dY of the delta S B, as batched products with operands in S's dtype, sums in float32.

    Args:
        B: Pages with scaling folded in; absent pages are zero. Pass float32 (a bfloat16 page cast to float32
            gives the same values) to get an unrounded gradient.
        S: x A^T as kept by the forward.
        dy: Gradient of the delta.
        out_features: Columns of each target.

    Returns:
        dS in S's dtype, with ranks in the order of A's pages; dB in B's dtype.
    """
    b, dy = _spread(B.astype(S.dtype), out_features), dy.astype(S.dtype)
    dS = jnp.einsum("glo,gmro->glmr", dy, b, preferred_element_type=F32).astype(S.dtype)
    dB = jnp.einsum("glmr,glo->gmro", _by_page(S), dy, preferred_element_type=F32)
    dB = dB.reshape(*B.shape[:2], len(out_features), *B.shape[2:])
    return dS, jnp.where(_blocks(out_features), dB, jnp.zeros((), F32)).sum(axis=2).astype(B.dtype)


def pack_x_xla(
    x: Float[Array, "G L in"],
    A: Float[Array, "G MP nR in"],
    dS: Float[Array, "G L MP nR"],
    dx: Float[Array, "G L in"] | None = None,
) -> tuple[Float[Array, "G L in"], Float[Array, "G MP nR in"]]:
    """dX = dS A and dA = dS^T X of S = x A^T, as batched products, likewise.

    Args:
        x: Inputs of the forward, after dropout if any.
        A: Pages of the n stacked targets, float32 likewise; absent pages are zero.
        dS: From `pack_dy_xla`.
        dx: Added to dX after dX is rounded to x's dtype.

    Returns:
        dX in x's dtype, dA in A's.
    """
    dX = jnp.einsum("glmr,gmri->gli", dS, A.astype(x.dtype), preferred_element_type=x.dtype)
    dA = jnp.einsum("glmr,gli->gmri", dS, x, preferred_element_type=F32)
    return dX if dx is None else dx + dX, dA.astype(A.dtype)
