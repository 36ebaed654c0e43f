"""The backward through a gated activation: cases, and what their gradients are compared with."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import smlm_bwd
from pallas_kernels.common.activation import ACTIVATIONS
from pallas_kernels.smlm import pack_plan
from tests.kernels.pack_cases import F32, Case, Gradients, flat, ids_of, pool_of, shrink
from tests.kernels.quick import quick_jit

GLU_CASES = {
    "one pack": Case(1, 64, 64, (48,), 1),
    "one row packs": Case(3, 1, 32, (32,), 1),
    "pages": Case(2, 32, 96, (64,), 3),
    "all odd": Case(2, 40, 80, (112,), 4),
    "rank 144": Case(1, 16, 32, (16,), 9),
}


def glu_arrays(case: Case, dtype: jnp.dtype = F32) -> list[jax.Array]:
    """gate_up, A, B, W, dy."""
    x, A, B, dy = case.arrays(dtype)
    W = 0.1 * jnp.sin(jnp.arange(case.size * case.outs[0], dtype=F32)).reshape(case.size, case.outs[0])
    return [jnp.concatenate([x, jnp.flip(x)], axis=-1), A, B, W.astype(dtype), dy]


def down(act: str, gate_up: jax.Array, A: jax.Array, B: jax.Array, W: jax.Array) -> jax.Array:
    """The projection of act(gate) * up with its adapter, in full."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    full = W[None] + jnp.einsum("gmrf,gmrd->gfd", A, B, precision="highest")
    return jnp.einsum("glf,gfd->gld", ACTIVATIONS[act](gate) * up, full, precision="highest")


@partial(quick_jit, static_argnums=0)
def reference_glu(act: str, *arrays: jax.Array) -> Gradients:
    """Gradients of gate_up, A and B, in float32."""
    gate_up, A, B, W, dy = (a.astype(F32) for a in arrays)
    return jax.vjp(lambda *a: down(act, *a, W), gate_up, A, B)[1](dy)


@partial(quick_jit, static_argnums=(0, 1))
def gradients_glu(
    act: str, implementation: str, gate_up: jax.Array, A: jax.Array, B: jax.Array, W: jax.Array, dy: jax.Array
) -> Gradients:
    gate, up = jnp.split(gate_up, 2, axis=-1)
    S = shrink(ACTIVATIONS[act](gate.astype(F32)).astype(gate.dtype) * up, A)

    def base(dy: jax.Array) -> jax.Array:
        return jnp.einsum("kd,fd->kf", dy.astype(F32), W.astype(F32), precision="highest").astype(dy.dtype)

    plan = pack_plan(ids_of(*A.shape[:2]), dy.shape[1])
    options = {"out_features": (dy.shape[2],), "implementation": implementation, "glu": (act, flat(gate_up))}
    d, dA, dB = smlm_bwd(flat(S), None, pool_of(A), pool_of(B), plan, flat(dy), dx=base, **options)
    return d.reshape(gate_up.shape), dA, dB
