"""The backward's public ops: shapes are refused with both named, and a pack's bits are its own by default too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.smlm import add_gradients, pack_backward_dy, pack_backward_x, pack_glu_backward, smlm_gated
from tests.kernels.quick import quick_jit
from tests.kernels.smlm_cases import MIXED, MIXED_ROWS, make_case

BOTH = pytest.mark.parametrize("implementation", ["xla", "triton"])


def zeros(*shape: int) -> jax.Array:
    return jnp.zeros(shape, jnp.float32)


@BOTH
@pytest.mark.parametrize(
    ("outs", "B", "S", "dy", "message"),
    [
        ((32,), (1, 1, 16, 64), (1, 32, 1, 1, 16), (1, 32, 64), r"B: got shape \(1, 1, 16, 64\), expected \(1, 1, 16"),
        ((64,), (1, 1, 16, 64), (1, 32, 2, 1, 16), (1, 32, 64), r"S: got shape \(1, 32, 2, 1, 16\), expected \(1, 32"),
        ((64,), (1, 1, 16, 64), (1, 32, 1, 1, 16), (1, 31, 64), r"dy: got shape \(1, 31, 64\), expected \(1, 32, 64\)"),
        ((64,), (2, 1, 16, 64), (1, 32, 1, 1, 16), (1, 32, 64), r"B: got shape \(2, 1, 16, 64\), expected \(1, 1, 16"),
        ((64,), (1, 1, 16, 64), (1, 32, 1, 16), (1, 32, 64), r"S: got shape \(1, 32, 1, 16\), expected 5 dimensions"),
    ],
)  # fmt: skip
def test_the_half_that_reads_dy(outs, B, S, dy, message: str, implementation: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_backward_dy(zeros(*B), zeros(*S), zeros(*dy), outs, implementation=implementation)


@BOTH
@pytest.mark.parametrize(
    ("A", "dS", "dx", "message"),
    [
        ((1, 1, 16, 48), (1, 16, 1, 16), None, r"dS: got shape \(1, 16, 1, 16\), expected \(1, 32, 1, 16\)"),
        ((1, 1, 16, 48), (1, 32, 2, 16), None, r"dS: got shape \(1, 32, 2, 16\), expected \(1, 32, 1, 16\)"),
        ((1, 1, 16, 64), (1, 32, 1, 16), None, r"A: got shape \(1, 1, 16, 64\), expected \(1, 1, 16, 48\)"),
        ((1, 1, 16, 48), (1, 32, 1, 16), (1, 32, 64), r"dx: got shape \(1, 32, 64\), expected \(1, 32, 48\)"),
    ],
)
def test_the_half_that_reads_x(A, dS, dx, message: str, implementation: str) -> None:
    dx = dx and zeros(*dx)
    with pytest.raises(ValueError, match=message):
        pack_backward_x(zeros(1, 32, 48), zeros(*A), zeros(*dS), dx, implementation=implementation)


def test_an_unknown_implementation() -> None:
    with pytest.raises(ValueError, match="implementation: got 'cuda', expected"):
        pack_backward_dy(
            zeros(1, 1, 16, 64), zeros(1, 32, 1, 1, 16), zeros(1, 32, 64), (64,), implementation="cuda"
        )
    with pytest.raises(ValueError, match="implementation: got 'cuda', expected"):
        pack_backward_x(zeros(1, 32, 48), zeros(1, 1, 16, 48), zeros(1, 32, 1, 16), implementation="cuda")


@BOTH
def test_the_pool(implementation: str) -> None:
    for ids, delta in (((2, 1), (1, 1, 16, 8)), ((1, 1), (1, 1, 16, 4))):
        with pytest.raises(ValueError, match=r"deltas\[0\]: got shape"):
            pool = [zeros(5, 16, 8)]
            add_gradients(pool, jnp.ones(ids, jnp.int32), [zeros(*delta)], implementation=implementation)


def test_the_gated_kernels() -> None:
    good = (zeros(1, 32, 96), zeros(1, 1, 16, 48), zeros(1, 32, 1, 16), zeros(1, 32, 48))
    for at, shape in ((0, (1, 32, 48)), (1, (1, 1, 32, 48)), (2, (1, 31, 1, 16))):
        bad = [*good[:at], zeros(*shape), *good[at + 1 :]]
        with pytest.raises(ValueError, match=f"{('gate_up', 'A', 'dS')[at]}: got shape"):
            pack_glu_backward(*bad, "silu")
    with pytest.raises(ValueError, match="activation: got 'gelu', expected one of"):
        pack_glu_backward(*good, "gelu")
    case = make_case(MIXED, MIXED_ROWS, 48, (80, 80))
    with pytest.raises(ValueError, match=r"y: got shape \(160,\), expected 2 dimensions"):
        smlm_gated(case.x, case.A, case.B, case.plan, y=case.y[0], activation="silu")


@pytest.mark.slow
def test_a_pack_keeps_its_bits_with_the_default_blocks() -> None:
    """In bfloat16, at a length where one pack and three are on two sides of a shape class of all rows."""
    rng, rows, outs = np.random.default_rng(0), 512, (8208,)

    def draw(*shape: int, dtype: jnp.dtype = jnp.bfloat16) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    gated = (draw(3, rows, 128), draw(3, 1, 16, 64, dtype=jnp.float32), draw(3, rows, 1, 16), draw(3, rows, 64))
    dy = (draw(3, 1, 16, 8208, dtype=jnp.float32), draw(3, rows, 1, 1, 16), draw(3, rows, 8208))
    for f, arrays in (
        (lambda *a: pack_glu_backward(*a, "silu"), gated),
        (lambda *a: pack_backward_dy(*a, outs, implementation="triton"), dy),
    ):
        f = quick_jit(f)
        for alone, beside in zip(f(*(a[:1] for a in arrays)), f(*arrays), strict=True):
            np.testing.assert_array_equal(alone[0], beside[0])
