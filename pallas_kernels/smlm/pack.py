"""LoRA of training packs: every pack is of one adapter, so the products are batched.

The forward in two halves, `pack_shrink` and `pack_expand`, the backward as one op, and `pack_lora`, all of them
together, for autodiff.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pallas_kernels.smlm.pack_triton import pack_backward_triton
from pallas_kernels.smlm.plan import RANK_PAGE

F32 = jnp.float32
IMPLEMENTATIONS = ("xla", "triton")


def choose(implementation: str | None) -> str:
    """The implementation of a backward op: None is triton on a GPU and xla elsewhere.

    Raises:
        ValueError: the implementation is unknown.
    """
    if implementation is None:
        return "triton" if jax.default_backend() == "gpu" else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: got {implementation!r}, expected one of {IMPLEMENTATIONS} or None")
    return implementation


def pack_shrink(x: Float[Array, "G L in"], A: Float[Array, "G MP nR in"]) -> Float[Array, "G L n MP R"]:
    """S = x A^T, target by target: summed in float32, rounded to x's dtype."""
    S = jnp.einsum("gli,gmri->glmr", x, A.astype(x.dtype), preferred_element_type=F32).astype(x.dtype)
    return S.reshape(*S.shape[:3], -1, RANK_PAGE).swapaxes(2, 3)


def pack_expand(
    S: Float[Array, "G L n MP R"], B: Float[Array, "G MP R out"], out_features: tuple[int, ...]
) -> Float[Array, "G L out"]:
    """The delta S B: summed in float32, rounded once to S's dtype."""
    b = _spread(B.astype(S.dtype), out_features)
    return jnp.einsum("glmr,gmro->glo", _by_page(S), b, preferred_element_type=S.dtype)


def pack_backward(
    x: Float[Array, "G L in"],
    A: Float[Array, "G MP nR in"],
    B: Float[Array, "G MP R out"],
    S: Float[Array, "G L n MP R"],
    dy: Float[Array, "G L out"],
    out_features: tuple[int, ...],
    *,
    dx: Float[Array, "G L in"] | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array, Array]:
    """dX, dA and dB of the delta S B with S = x A^T; sums in float32, operands in x's dtype.

    Args:
        x: Inputs of the forward; dropout, where there is any, already applied.
        A: Pages of the n stacked targets; absent pages are zero. Pass float32 (a bfloat16 page cast to float32
            computes the same values) to get gradients that were never rounded.
        B: Pages with scaling folded in; absent pages are zero.
        S: `pack_shrink` of x and A, or what `smlm` kept of it, in x's dtype.
        dy: Gradient of the delta.
        out_features: Columns of each target.
        dx: What dX is added to, x's dtype: the gradient of x through the base projection. The kernels write the sum
            over it where XLA may reuse the buffer.
        implementation: "xla", "triton", or None for triton on a GPU and xla elsewhere.

    Returns:
        Gradients of x, A and B in their own dtypes.

    Raises:
        ValueError: shapes disagree, or the implementation is unknown; both values are named.
    """
    out_features = tuple(out_features)
    check_pages(x, A, B, out_features)
    function = pack_backward_triton if choose(implementation) == "triton" else pack_backward_xla
    return function(x, A, B, S, dy, out_features, dx)


def pack_lora(
    x: Float[Array, "G L in"],
    A: Float[Array, "G MP nR in"],
    B: Float[Array, "G MP R out"],
    out_features: tuple[int, ...],
    *,
    implementation: str | None = None,
) -> Float[Array, "G L out"]:
    """The LoRA delta of G packs of L rows, pack g under the adapter whose pages are A[g], B[g]. Differentiable.

    For research: a training step has S from its forward, and `pack_backward`. Packs never mix.

    Args:
        x, A, B, out_features: As for `pack_backward`.
        implementation: Of the backward.

    Returns:
        The delta in x's dtype.

    Raises:
        ValueError: shapes disagree, or the implementation is unknown; both values are named.
    """
    check_pages(x, A, B, tuple(out_features))
    return _pack_lora(x, A, B, tuple(out_features), choose(implementation))


def check_pages(x: Array, A: Array, B: Array, out_features: tuple[int, ...]) -> None:
    """The pages have the shapes that x and out_features imply.

    Raises:
        ValueError: they have not.
    """
    G, _, size = x.shape
    want_A = (G, A.shape[1], len(out_features) * RANK_PAGE, size)
    want_B = (G, A.shape[1], RANK_PAGE, sum(out_features))
    if A.shape != want_A or B.shape != want_B:
        raise ValueError(
            f"A, B: got shapes {A.shape}, {B.shape}, expected {want_A}, {want_B} "
            f"for x {x.shape} and out_features {out_features}"
        )


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _pack_lora(x: Array, A: Array, B: Array, out_features: tuple[int, ...], implementation: str) -> Array:
    return _forward(x, A, B, out_features, implementation)[0]


def _forward(
    x: Array, A: Array, B: Array, out_features: tuple[int, ...], implementation: str
) -> tuple[Array, tuple[Array, ...]]:
    S = pack_shrink(x, A)
    return pack_expand(S, B, out_features), (x, A, B, S)


def _backward(
    out_features: tuple[int, ...], implementation: str, kept: tuple[Array, ...], dy: Array
) -> tuple[Array, Array, Array]:
    return pack_backward(*kept, dy, out_features, implementation=implementation)


_pack_lora.defvjp(_forward, _backward)


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


def pack_backward_xla(
    x: Float[Array, "G L in"],
    A: Float[Array, "G MP nR in"],
    B: Float[Array, "G MP R out"],
    S: Float[Array, "G L n MP R"],
    dy: Float[Array, "G L out"],
    out_features: tuple[int, ...],
    dx: Float[Array, "G L in"] | None = None,
) -> tuple[Array, Array, Array]:
    """dS = dY B^T, dX = dS A, dA = dS^T X, dB = S^T dY; dX is rounded to x's dtype, then added to dx.

    Args and result are those of `pack_backward`.
    """
    a, b, dy = A.astype(x.dtype), _spread(B.astype(x.dtype), out_features), dy.astype(x.dtype)
    dS = jnp.einsum("glo,gmro->glmr", dy, b, preferred_element_type=F32).astype(x.dtype)
    dX = jnp.einsum("glmr,gmri->gli", dS, a, preferred_element_type=x.dtype)
    dA = jnp.einsum("glmr,gli->gmri", dS, x, preferred_element_type=F32)
    dB = jnp.einsum("glmr,glo->gmro", _by_page(S), dy, preferred_element_type=F32)
    dB = dB.reshape(*B.shape[:2], len(out_features), *B.shape[2:])
    dB = jnp.where(_blocks(out_features), dB, jnp.zeros((), F32)).sum(axis=2)
    return dX if dx is None else dx + dX, dA.astype(A.dtype), dB.astype(B.dtype)
