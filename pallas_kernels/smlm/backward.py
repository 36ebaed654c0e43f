"""The backward of SMLM for train rows: gradients of x, and of A and B separately for every pack."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.common.activation import KERNEL_ACTIVATIONS, check_activation, gated
from pallas_kernels.common.checks import check_dtype, check_shapes
from pallas_kernels.common.implementation import choose
from pallas_kernels.smlm.checks import check_backward
from pallas_kernels.smlm.pack_glu import pack_glu_triton
from pallas_kernels.smlm.pack_triton import pack_dy_triton, pack_x_triton
from pallas_kernels.smlm.pack_xla import expand_packs, pack_dy_xla, pack_x_xla
from pallas_kernels.smlm.plan import SmlmPlan

Glu = tuple[str, Float[Array, "K FF"]]  # (activation, [gate | up])


def smlm_bwd(
    S: Float[Array, "K n MP R"],
    x: Float[Array, "K in"] | None,
    A: Float[Array, "P nR in"],
    B: Float[Array, "P R out"],
    plan: SmlmPlan,
    dy: Float[Array, "K out"],
    *,
    out_features: tuple[int, ...],
    dx: Float[Array, "K in"] | Callable[[Array], Array] | None = None,
    glu: Glu | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "K in_or_FF"], Float32[Array, "G GP nR in"], Float32[Array, "G GP R out"]]:
    """The backward of `smlm` for the plan's train rows: dX, and separate dA and dB for every pack.

    dS = dY B^T, dX = dS A, dA = dS^T X, dB = S^T dY per pack, with operands in x's dtype and sums in float32, in an
    order that depends only on the pack's shape. Nothing is summed over packs (`scatter_add_pages` does that), so the
    other packs in a step cannot change a job's gradient. Two launches: one reads dY, the other x.

    Args:
        S: As returned by `smlm_fwd`; pages beyond those in plan.pack_pages are not read.
        x: Inputs of the K train rows; None with `glu`.
        A, B: Page pools, as for `smlm_fwd`; the pages of every pack are gathered once.
        plan: Only `pack_pages` and `pack_rows` are read; see `pack_plan`.
        dy: Gradient of the train rows' output.
        out_features: Columns of each target.
        dx: Added to dX: the gradient of x through the base projection, or a function dy -> that gradient, which is
            called between the two launches, while dy is still in the cache. None means 0.
        glu: (activation, gate_up) if x is act(gate) * up of the halves of gate_up: x is recomputed from them, and the
            first result is the gradient of gate_up.
        implementation: As for `smlm`.

    Returns:
        dX (or d gate_up) in x's dtype; float32 dA and dB of each pack's pages, 0 for absent pages.

    Raises:
        ValueError: shapes disagree, the plan has no packs, or the implementation or activation is unknown.
        TypeError: dtypes disagree.
    """
    choice, out_features = choose(implementation), tuple(int(size) for size in out_features)
    like = x if glu is None else _glu_input(x, glu)
    check_backward(S, like, A, B, plan, dy, out_features)
    a, b = (_pages_of_packs(pool, plan.pack_pages) for pool in (A, B))
    by_pack = partial(_by_pack, plan)
    dy_half = pack_dy_triton if choice == "triton" else pack_dy_xla
    dS, dB = dy_half(b, by_pack(S)[:, :, :, : b.shape[1]], by_pack(dy), out_features)
    dS, dx = between_halves(dS, dy, dx, like)
    if glu is not None:
        d, dA = _x_half_of_glu(glu, a, dS, dx, plan, choice)
        return d, dA, dB
    x_half = pack_x_triton if choice == "triton" else pack_x_xla
    dX, dA = x_half(by_pack(x), a, dS, None if dx is None else by_pack(dx))
    return dX.reshape(x.shape), dA, dB


def between_halves(
    dS: Any, dy: Array, dx: Array | Callable[[Array], Array] | None, like: Array | jax.ShapeDtypeStruct
) -> tuple[Any, Array | None]:
    """(dS, dx), evaluated after the half that reads dy; calls dx if it is a function.

    Raises:
        ValueError, TypeError: dx does not have the shape or dtype of the input `like`.
    """
    if callable(dx):
        # The adapter's half comes first: the base's product would evict dy from the cache.
        dS, dy = lax.optimization_barrier((dS, dy))
        dx = dx(dy)
    if dx is not None:
        check_shapes(dx=(dx, like.shape))
        check_dtype("dx", dx, "x", like.dtype)
    return dS, dx


def smlm_expand(
    S: Float[Array, "K n MP R"],
    B: Float[Array, "P R out"],
    plan: SmlmPlan,
    *,
    out_features: tuple[int, ...],
) -> Float[Array, "K out"]:
    """Recomputes the delta of the train rows from the S that `smlm_fwd` returned, if the output was not kept.

    Accumulated in float32, rounded once to S's dtype.

    Args:
        S, B, plan, out_features: As for `smlm_bwd`.
    """
    b = _pages_of_packs(B, plan.pack_pages)
    return expand_packs(_by_pack(plan, S)[:, :, :, : b.shape[1]], b, out_features).reshape(S.shape[0], -1)


def _by_pack(plan: SmlmPlan, rows: Array) -> Array:
    return rows.reshape(-1, plan.pack_rows, *rows.shape[1:])


def _pages_of_packs(pool: Float[Array, "P r c"], pages: Int32[Array, "G GP"]) -> Float32[Array, "G GP r c"]:
    """The pages of every pack in float32, so that their gradients are too; absent pages are 0."""
    return jnp.where((pages > 0)[..., None, None], pool[pages].astype(jnp.float32), 0.0)


def _glu_input(x: Array | None, glu: Glu) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the x that `glu` describes."""
    activation, gate_up = glu
    check_activation(activation)
    if x is not None:
        raise ValueError(f"x: got shape {x.shape}, expected None with glu: it is computed from gate_up")
    return jax.ShapeDtypeStruct((gate_up.shape[0], gate_up.shape[1] // 2), gate_up.dtype)


def _x_half_of_glu(
    glu: Glu, A: Array, dS: Array, dx: Array | None, plan: SmlmPlan, implementation: str
) -> tuple[Array, Array]:
    """d gate_up and dA; fused if the kernel supports the activation."""
    activation, gate_up = glu
    by_pack = partial(_by_pack, plan)
    if implementation == "triton" and activation in KERNEL_ACTIVATIONS:
        dx = jnp.zeros((gate_up.shape[0], gate_up.shape[1] // 2), gate_up.dtype) if dx is None else dx
        d, dA = pack_glu_triton(by_pack(gate_up), A, dS, by_pack(dx), activation)
        return d.reshape(gate_up.shape), dA
    x_half = pack_x_triton if implementation == "triton" else pack_x_xla
    x, transpose = jax.vjp(partial(gated, activation), gate_up)
    dX, dA = x_half(by_pack(x), A, dS, None if dx is None else by_pack(dx))
    return transpose(dX.reshape(x.shape))[0], dA
