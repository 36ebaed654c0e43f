"""LoRA of training packs against the plain formula and its autodiff, every implementation; packs never mix."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.smlm import pack_expand
from pallas_kernels.smlm.pack import pack_backward_xla
from pallas_kernels.smlm.pack_triton import pack_backward_triton
from pallas_kernels.smlm.pack_tuning import Block, DyConfig, XConfig
from tests.kernels.pack_cases import CASES, Case, plain, reference, shrink
from tests.kernels.quick import quick_jit
from tests.tolerances import assert_close

SMALL = {
    "dy_config": DyConfig(Block(16, 32), Block(32, 32, 64), turns=2),
    "x_config": XConfig(Block(16, 32), Block(32, 16, 32)),
}
"""Several blocks even of small packs; a GPU takes the blocks that it takes in earnest."""

BOTH = pytest.mark.parametrize("implementation", ["xla", "triton"])


@partial(quick_jit, static_argnames=("case", "implementation"))
def gradients(
    case: Case, implementation: str, x: jax.Array, A: jax.Array, B: jax.Array, dy: jax.Array,
    dx: jax.Array | None = None,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """dX (added to dx), dA, dB."""
    if implementation == "xla":
        return pack_backward_xla(x, A, B, shrink(x, A), dy, case.outs, dx)
    config = SMALL if jax.default_backend() == "cpu" else {}
    return pack_backward_triton(x, A, B, shrink(x, A), dy, case.outs, dx, **config)


@pytest.mark.also_gpu
@BOTH
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_formula(name: str, implementation: str) -> None:
    case = CASES[name]
    x, A, B, dy = case.arrays()
    got = gradients(case, implementation, x, A, B, dy)
    for one, other, like in zip(got, reference(case, x, A, B, dy), (x, A, B), strict=True):
        assert one.dtype == like.dtype
        assert_close(one, other, "logits_f32")


@pytest.mark.also_gpu
@pytest.mark.parametrize("name", ["targets", "all odd"])
def test_the_delta_is_that_of_the_formula(name: str) -> None:
    case = CASES[name]
    x, A, B, _ = case.arrays()
    assert_close(pack_expand(shrink(x, A), B, case.outs), plain(x, A, B, case.outs), "logits_f32")


@pytest.mark.also_gpu
@BOTH
@pytest.mark.parametrize("name", ["all odd", pytest.param("pages", marks=pytest.mark.slow)])
def test_bfloat16_rows_give_float32_gradients_of_float32_pages(name: str, implementation: str) -> None:
    case = CASES[name]
    x, A, B, dy = case.arrays(jnp.bfloat16)
    got = gradients(case, implementation, x, A, B, dy)
    assert [a.dtype for a in got] == [jnp.bfloat16, jnp.float32, jnp.float32]
    for one, other in zip(got, reference(case, x, A, B, dy), strict=True):
        scale = float(jnp.abs(other).max())
        assert_close(one.astype(jnp.float32) / scale, other / scale, "bf16_grad")


@pytest.mark.also_gpu
@BOTH
@pytest.mark.parametrize("name", ["targets", pytest.param("one row packs", marks=pytest.mark.slow)])
def test_dx_is_added_to_what_is_given(name: str, implementation: str) -> None:
    case = CASES[name]
    x, A, B, dy = case.arrays()
    given = jnp.sin(x)
    want = gradients(case, implementation, x, A, B, dy)
    got = gradients(case, implementation, x, A, B, dy, given)
    assert_close(got[0], given + want[0], "f32")
    for one, other in zip(got[1:], want[1:], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.also_gpu
def test_the_sum_with_a_given_dx_is_rounded_once() -> None:
    case = CASES["one pack"]
    x, A, B, dy = case.arrays(jnp.bfloat16)
    given = 8 * x
    got = gradients(case, "triton", x, A, B, dy, given)[0].astype(jnp.float32)
    want = given.astype(jnp.float32) + reference(case, x, A, B, dy)[0]
    assert float(jnp.abs(got - want).max() / jnp.abs(want).max()) < 2**-8


@BOTH
def test_a_pack_keeps_its_bits_beside_any_other(implementation: str) -> None:
    case = CASES["all odd"]
    x, A, B, dy = case.arrays()
    alone = gradients(case, implementation, x[1:2], A[1:2], B[1:2], dy[1:2])
    for bad in (x.at[0].set(jnp.nan), x.at[2, -1].set(jnp.inf)):
        beside = gradients(case, implementation, bad, A.at[2].set(jnp.inf), B.at[0].set(jnp.nan), dy)
        for one, other in zip(alone, beside, strict=True):
            np.testing.assert_array_equal(one[0], other[1])


@BOTH
def test_absent_pages_add_nothing(implementation: str) -> None:
    case = CASES["one pack"]
    x, A, B, dy = case.arrays()
    padded = [jnp.concatenate([a, jnp.zeros_like(a)], axis=1) for a in (A, B)]
    dx, dA, dB = gradients(case, implementation, x, A, B, dy)
    got = gradients(case, implementation, x, *padded, dy)
    assert_close(got[0], dx, "f32")
    for one, other in zip(got[1:], (dA, dB), strict=True):
        assert_close(one[:, :1], other, "f32")
        np.testing.assert_array_equal(one[:, 1:], 0)
