"""gate and up with their adapters and the activation in one kernel, against the formula; S for the backward."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from pallas_kernels.smlm import RANK_PAGE, Gated, gate_fused, plan_shapes, smlm, smlm_gated
from pallas_kernels.smlm import triton as launches
from pallas_kernels.smlm.gated import smlm_gated_triton
from tests.kernels.quick import quick_jit
from tests.kernels.smlm_cases import CASES, MIXED, MIXED_ROWS, Case, brute_force, brute_S, make_case
from tests.tolerances import assert_close

ACTIVATIONS = {
    "silu": lambda x: x * expit(x),
    "relu": lambda x: np.maximum(x, 0),
    "gelu_pytorch_tanh": lambda x: x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
}


KEEP = 90  # of 118 rows: one program for most tests


jitted = quick_jit(smlm_gated, static_argnames=("activation", "keep_rows", "keep_y"))


def run(case: Case, activation: str = "silu", keep_rows: int = KEEP, **options: object) -> Gated:
    return jitted(case.x, case.A, case.B, case.plan, y=case.y, activation=activation, keep_rows=keep_rows, **options)


@pytest.mark.also_gpu
@pytest.mark.parametrize("name", ["silu", pytest.param("relu", marks=pytest.mark.slow), "gelu_pytorch_tanh"])
def test_the_kernel_is_the_formula(name: str) -> None:
    case = CASES["two halves"]()
    gate_up = case.y + brute_force(case)
    found = run(case, name)
    assert_close(found.out, ACTIVATIONS[name](gate_up[:, :80]) * gate_up[:, 80:], "f32")
    assert_close(found.kept, gate_up[:KEEP], "f32")
    assert_close(found.S, brute_S(case, KEEP), "f32")


def test_rounds_like_the_kernels_one_after_the_other() -> None:
    """In bfloat16 gate, up, act(gate) and the product are each rounded once: equality, not a tolerance."""
    case = make_case(MIXED, MIXED_ROWS, 64, (96, 96), dtype=jnp.bfloat16)
    found = run(case, keep_rows=MIXED_ROWS)
    options = {"out_features": (96, 96), "implementation": "triton"}
    y = quick_jit(partial(smlm, **options))(case.x, case.A, case.B, case.plan, y=case.y)
    np.testing.assert_array_equal(found.kept, y)
    gate, up = (half.astype(jnp.float32) for half in jnp.split(y, 2, axis=1))
    want = jax.nn.silu(gate).astype(jnp.bfloat16).astype(jnp.float32) * up
    np.testing.assert_array_equal(found.out, want.astype(jnp.bfloat16))


def test_nothing_is_kept_unless_asked_for() -> None:
    case = CASES["two halves"]()
    f, arguments = partial(smlm_gated, y=case.y, activation="silu"), (case.x, case.A, case.B, case.plan)
    assert jax.eval_shape(f, *arguments)[1:] == (None, None)
    found = jax.eval_shape(partial(f, keep_rows=10, keep_y=False), *arguments)
    assert found.kept is None
    assert found.S.shape == (10, 2, 3, RANK_PAGE)


@pytest.mark.parametrize("segments", [[], [(0, MIXED_ROWS, (1,))], [(5, 1, (2, 3, 4))]], ids=["none", "all", "one"])
def test_every_row_is_computed_whoever_has_an_adapter(segments: list) -> None:
    case = make_case(segments, MIXED_ROWS, 48, (80, 80))
    case.A[0], case.B[0] = np.nan, np.nan  # page 0 means none: it is never read
    gate_up = case.y + brute_force(case)
    assert_close(run(case).out, gate_up[:, :80] * expit(gate_up[:, :80]) * gate_up[:, 80:], "f32")


def test_a_bad_adapter_stays_with_its_rows() -> None:
    case = CASES["two halves"]()
    want = run(case)
    case.A[2] = np.nan  # the second page of rows 0 to 69
    found = run(case)
    for got, expected in zip(found, want, strict=True):
        np.testing.assert_array_equal(got[70:], expected[70:])
    assert np.isnan(found.out[:70]).all()


def forget() -> None:
    """What was traced: a patched constant is no argument of a trace."""
    jitted.clear_cache()
    smlm_gated_triton.clear_cache()


def test_a_bounded_grid_walks_all_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["two halves"]()
    want = run(case)
    monkeypatch.setattr(launches, "MAX_PROGRAMS", 3)
    forget()
    got = run(case)
    forget()
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_bad_arguments_are_refused() -> None:
    case = CASES["two halves"]()
    with pytest.raises(ValueError, match="keep_rows: got 119, expected 0 to x's 118 rows"):
        run(case, keep_rows=119)
    with pytest.raises(ValueError, match="S_rows: got -1, expected 0 to x's 118 rows"):
        smlm(case.x, case.A, case.B, case.plan, out_features=(80, 80), S_rows=-1)
    with pytest.raises(ValueError, match="activation: got 'gelu', expected one of"):
        run(case, "gelu")
    case.y = case.y[:, :-2]
    with pytest.raises(ValueError, match="out_features: got"):
        run(case)


def test_it_is_for_kernels() -> None:
    assert gate_fused("silu", "triton")
    assert not gate_fused("silu", "xla")
    assert not gate_fused("silu", None)  # on a CPU
    assert not gate_fused("gelu", "triton")


@pytest.mark.parametrize(
    ("name", "dtype"), [("silu", jnp.bfloat16), ("gelu_pytorch_tanh", jnp.float32)], ids=["bf16_silu", "f32_gelu"]
)
def test_lowers_for_cuda(name: str, dtype: jnp.dtype, lower_for_cuda: Callable[..., str]) -> None:
    shapes = [(1568, 4096), (65, 32, 4096), (65, 16, 28672), (1568, 28672)]
    x, A, B, y = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)

    def f(x, A, B, plan, y):
        return smlm_gated_triton(x, A, B, plan, y, name, 1024, interpret=False)

    text = lower_for_cuda(f, x, A, B, plan_shapes(1568, 130, 4, 62), y)
    assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 2
