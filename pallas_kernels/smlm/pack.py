"""LoRA of training packs: every pack is of one adapter, so the products are batched.

The delta from the S that `smlm` kept, `pack_expand`, and the backward in two halves, `pack_backward_dy` and
`pack_backward_x`.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pallas_kernels.smlm.checks import check_rank, check_shapes, choose
from pallas_kernels.smlm.pack_triton import backward_dy, backward_x
from pallas_kernels.smlm.plan import RANK_PAGE

F32 = jnp.float32


def pack_expand(
    S: Float[Array, "G L n MP R"], B: Float[Array, "G MP R out"], out_features: tuple[int, ...]
) -> Float[Array, "G L out"]:
    """The delta S B: summed in float32, rounded once to S's dtype."""
    b = _spread(B.astype(S.dtype), out_features)
    return jnp.einsum("glmr,gmro->glo", _by_page(S), b, preferred_element_type=S.dtype)


def pack_backward_dy(
    B: Float[Array, "G MP R out"],
    S: Float[Array, "G L n MP R"],
    dy: Float[Array, "G L out"],
    out_features: tuple[int, ...],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "G L MP nR"], Float[Array, "G MP R out"]]:
    """dS = dY B^T and dB = S^T dY of the delta S B: the half of the backward that reads dY.

    Sums in float32, operands in S's dtype.

    Args:
        B: Pages with scaling folded in; absent pages are zero. Pass float32 (a bfloat16 page cast to float32
            computes the same values) to get a gradient that was never rounded.
        S: What `smlm` kept of x A^T.
        dy: Gradient of the delta.
        out_features: Columns of each target.
        implementation: "xla", "triton", or None for triton on a GPU and xla elsewhere.

    Returns:
        dS in S's dtype, its ranks in the order of A's pages; dB in B's dtype.

    Raises:
        ValueError: shapes disagree, or the implementation is unknown; both values are named.
    """
    check_rank("S", S, 5)
    (G, L, _, MP, R), out = S.shape, sum(out_features)
    check_shapes(S=(S, (G, L, len(out_features), MP, RANK_PAGE)), B=(B, (G, MP, R, out)), dy=(dy, (G, L, out)))
    function = backward_dy if choose(implementation) == "triton" else backward_dy_xla
    return function(B, S, dy, tuple(out_features))


def pack_backward_x(
    x: Float[Array, "G L in"],
    A: Float[Array, "G MP nR in"],
    dS: Float[Array, "G L MP nR"],
    dx: Float[Array, "G L in"] | None = None,
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "G L in"], Float[Array, "G MP nR in"]]:
    """dX = dS A and dA = dS^T X of S = x A^T: the half of the backward that reads x.

    Sums in float32, operands in x's dtype.

    Args:
        x: Inputs of the forward; dropout, where there is any, already applied.
        A: Pages of the n stacked targets, float32 likewise; absent pages are zero.
        dS: Of `pack_backward_dy`.
        dx: What dX is added to, x's dtype: the gradient of x through the base projection. The kernels write the sum
            over it where XLA may reuse the buffer.
        implementation: As for `pack_backward_dy`.

    Returns:
        dX in x's dtype, dA in A's.

    Raises:
        ValueError: shapes disagree, or the implementation is unknown; both values are named.
    """
    check_rank("x", x, 3)
    check_rank("A", A, 4)
    (G, L, size), (_, MP, ranks, _) = x.shape, A.shape
    check_shapes(A=(A, (G, MP, ranks, size)), dS=(dS, (G, L, MP, ranks)), dx=(x if dx is None else dx, x.shape))
    return (backward_x if choose(implementation) == "triton" else backward_x_xla)(x, A, dS, dx)


def _blocks(out_features: tuple[int, ...]) -> Bool[np.ndarray, "n 1 out"]:
    """Which columns of the fused output belong to which target."""
    owner = np.repeat(np.arange(len(out_features)), out_features)
    return (np.arange(len(out_features))[:, None] == owner)[:, None]


def _spread(B: Float[Array, "G MP R out"], out_features: tuple[int, ...]) -> Float[Array, "G MP nR out"]:
    """B as one block-diagonal matrix over the stacked ranks: one product serves all targets, and dY is never cut."""
    G, M, R, out = B.shape
    spread = jnp.where(_blocks(out_features), B[:, :, None], jnp.zeros((), B.dtype))
    return spread.reshape(G, M, len(out_features) * R, out)


def _by_page(S: Float[Array, "G L n MP R"]) -> Float[Array, "G L MP nR"]:
    """S as A's pages have their ranks."""
    return S.swapaxes(2, 3).reshape(*S.shape[:2], S.shape[3], -1)


def backward_dy_xla(B: Array, S: Array, dy: Array, out_features: tuple[int, ...]) -> tuple[Array, Array]:
    """`pack_backward_dy` as batched products."""
    b, dy = _spread(B.astype(S.dtype), out_features), dy.astype(S.dtype)
    dS = jnp.einsum("glo,gmro->glmr", dy, b, preferred_element_type=F32).astype(S.dtype)
    dB = jnp.einsum("glmr,glo->gmro", _by_page(S), dy, preferred_element_type=F32)
    dB = dB.reshape(*B.shape[:2], len(out_features), *B.shape[2:])
    return dS, jnp.where(_blocks(out_features), dB, jnp.zeros((), F32)).sum(axis=2).astype(B.dtype)


def backward_x_xla(x: Array, A: Array, dS: Array, dx: Array | None = None) -> tuple[Array, Array]:
    """`pack_backward_x` as batched products; dX is rounded to x's dtype, then added to dx."""
    dX = jnp.einsum("glmr,gmri->gli", dS, A.astype(x.dtype), preferred_element_type=x.dtype)
    dA = jnp.einsum("glmr,gli->gmri", dS, x, preferred_element_type=F32)
    return dX if dx is None else dx + dX, dA.astype(A.dtype)


def pack_backward_xla(
    x: Array, A: Array, B: Array, S: Array, dy: Array, out_features: tuple[int, ...], dx: Array | None = None
) -> tuple[Array, Array, Array]:
    """dX, dA and dB: `backward_dy_xla`, then `backward_x_xla`."""
    dS, dB = backward_dy_xla(B, S, dy, out_features)
    dX, dA = backward_x_xla(x, A, dS, dx)
    return dX, dA, dB
