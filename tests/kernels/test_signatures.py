"""Shapes and dtypes in the signatures of the public ops are those that come and go, and others are refused."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

import pallas_kernels as ops
from pallas_kernels.smlm import pack_plan, smlm_expand, smlm_ref
from tests.kernels import paged_attention_cases
from tests.kernels.smlm_cases import make_case

G, L, MP, SIZE, OUTS = 2, 64, 2, 32, (32, 32)
CASE = make_case([], G * L, SIZE, OUTS)
X, A, B, Y = (jnp.asarray(a) for a in (CASE.x, CASE.A, CASE.B, CASE.y))
S = jnp.zeros((G * L, len(OUTS), MP, 16))
PAGES = jnp.asarray([[1, 2], [3, 0]], jnp.int32)
PLAN = jax.tree.map(jnp.asarray, pack_plan(PAGES, L))
XLA = {"implementation": "xla"}
GLU = ("silu", jnp.zeros((G * L, 2 * SIZE)))
ATTENTION = paged_attention_cases.CASES[0]
Q, K, V, BLOCKS = (jax.tree.map(jnp.asarray, a) for a in paged_attention_cases.build(ATTENTION))
ROWS = jnp.zeros((G, L), jnp.int32)

CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "smlm": (partial(ops.smlm, plan=PLAN, out_features=OUTS, y=Y, **XLA), (X, A, B)),
    "smlm_ref": (partial(smlm_ref, plan=PLAN, out_features=OUTS), (X, A, B)),
    "smlm_fwd": (partial(ops.smlm_fwd, plan=PLAN, out_features=OUTS, y=Y, **XLA), (X, A, B)),
    "smlm_bwd": (partial(ops.smlm_bwd, plan=PLAN, dy=Y, out_features=OUTS, **XLA), (S, X, A, B)),
    "smlm_bwd of a gated activation": (
        partial(ops.smlm_bwd, plan=PLAN, dy=Y, out_features=OUTS, glu=GLU, **XLA), (S, None, A, B),
    ),
    "smlm_expand": (partial(smlm_expand, plan=PLAN, out_features=OUTS), (S, B)),
    "smlm_glu": (partial(ops.smlm_glu, plan=PLAN, y=Y, activation="silu", **XLA), (X, A, B)),
    "scatter_add_pages": (partial(ops.scatter_add_pages, A, deltas=jnp.zeros((G, MP, *A.shape[1:])), **XLA), (PAGES,)),
    "paged_attention": (
        partial(ops.paged_attention, plan=BLOCKS, block_rows=ATTENTION.block_rows, scale=1.0, **XLA), (Q, K, V),
    ),
    "pack_attention": (
        partial(ops.pack_attention, positions=ROWS, segments=ROWS, scale=1.0, **XLA), (jnp.zeros((G, L, 2, 16)),) * 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_call_fits_its_signature(name: str) -> None:
    bound, arrays = CALLS[name]
    checked = jaxtyped(typechecker=beartype)(bound.func)
    f = partial(checked, *bound.args, **bound.keywords)
    jax.eval_shape(lambda *traced: f(*merged(arrays, traced)), *present(arrays))
    with pytest.raises(TypeCheckError):
        f(*merged(arrays, [np.zeros((2, 2, 2, 2, 2))] * len(arrays)))


def present(arrays: tuple[Any, ...]) -> list[jax.Array]:
    return [a for a in arrays if a is not None]


def merged(arrays: tuple[Any, ...], others: Any) -> list[Any]:
    """The others where an array is, None where it is None."""
    rest = iter(others)
    return [None if a is None else next(rest) for a in arrays]
