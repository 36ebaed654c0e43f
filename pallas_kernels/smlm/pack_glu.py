"""The backward of a gated MLP's second half, act(gate) * up and the projection after it, in two launches.

The first is that of any pack backward. The second reads gate, up and the base's gradient of the product once: it forms
the product again, the gradients of gate and up, and dA as a whole sum over a pack's rows.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.smlm.pack_kernels import Cut, Side, glu
from pallas_kernels.smlm.pack_triton import Work, check_elements, launch, read_dy, rows_of
from pallas_kernels.smlm.pack_tuning import Block, PackConfig, default_pack_config
from pallas_kernels.smlm.plan import RANK_PAGE

F32 = jnp.float32


@dataclass(frozen=True)
class GluConfig:
    """How the second launch is cut: rows at a time, columns of a program; warps and stages are Triton's."""

    block: Block
    warps: int = 4
    stages: int = 2


def default_glu_config(pages: int, dtype: jnp.dtype) -> GluConfig:
    """The configuration of a shape class, tuned on an H200."""
    if jnp.dtype(dtype).itemsize > 2 or pages * RANK_PAGE > 128:
        return GluConfig(Block(32, 32), 4, 1)
    return GluConfig(Block(64, 64), 4, 3)


# Jitted so that the layers of a model trace and lower the kernels once a shape.
@functools.partial(jax.jit, static_argnames=("activation", "config", "first", "interpret"))
def pack_glu_backward(
    gate_up: Float[Array, "G L FF"],
    A: Float[Array, "G MP R F"],
    B: Float[Array, "G MP R D"],
    S: Float[Array, "G L 1 MP R"],
    dy: Float[Array, "G L D"],
    dact: Float[Array, "G L F"],
    activation: Callable[[Array], Array],
    *,
    config: GluConfig | None = None,
    first: PackConfig | None = None,
    interpret: bool | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of gate_up, A and B of base(act) + S B, with act = activation(gate) * up and S = act A^T.

    Args:
        gate_up: gate and up side by side.
        A, B: Pages of the projection's adapter, float32 for gradients that are never rounded; absent ones are zero.
        S: Of the forward, in gate_up's dtype.
        dy: Gradient of the projection's output.
        dact: Gradient of act through the base projection, gate_up's dtype.
        activation: Elementwise, of float32; one that Pallas-Triton lowers (no erf).
        config: How the second launch is cut; by default chosen from the shapes.
        first: How the first is cut, likewise.
        interpret: Run as plain XLA operations; by default on the CPU only.

    Returns:
        Gradients of gate_up, A and B in their own dtypes; sums in float32.

    Raises:
        ValueError: an operand has 2^31 elements or more.
    """
    packs, rows, size = dact.shape
    pages, dtype = A.shape[1], gate_up.dtype
    check_elements(gate_up=gate_up, dy=dy)
    interpret = jax.default_backend() == "cpu" if interpret is None else interpret
    first = first or default_pack_config(packs * rows, (dy.shape[2],), pages, dtype)
    config = config or default_glu_config(pages, dtype)
    flat = rows_of(dtype, gate_up=gate_up, A=A, B=B, S=S.reshape(packs, rows, -1), dY=dy, dact=dact)
    dB, flat["dS"] = read_dy(Side(packs, rows, (dy.shape[2],), pages * RANK_PAGE), flat, first, interpret)
    side = Side(packs, rows, (size,), pages * RANK_PAGE)
    cut = Cut(side, config.block, side.chunks)
    outs = {
        "dA": jax.ShapeDtypeStruct(flat["A"].shape, F32),
        "d": jax.ShapeDtypeStruct(flat["gate_up"].shape, dtype),
    }
    work = Work(functools.partial(glu, activation), cut, cut.strips, ("gate_up", "dact", "dS", "A", "dA", "d"))
    params = plt.CompilerParams(num_warps=config.warps, num_stages=config.stages)
    found = launch("pack_backward_glu", [work], flat, outs, params, interpret)
    return tuple(d.reshape(a.shape).astype(a.dtype) for d, a in ((found["d"], gate_up), (found["dA"], A), (dB, B)))
