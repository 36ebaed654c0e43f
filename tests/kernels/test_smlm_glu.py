"""gate and up with their adapters and the activation, against the formula, every implementation."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, expit

from pallas_kernels import smlm_fwd, smlm_glu
from pallas_kernels.smlm import FEW_ROWS, RANK_PAGE
from pallas_kernels.smlm import triton as launches
from pallas_kernels.smlm_glu.triton import smlm_glu_triton
from tests.kernels.quick import quick_jit
from tests.kernels.smlm_cases import CASES, MIXED, MIXED_ROWS, Case, brute_force, brute_S, make_case, training
from tests.tolerances import assert_close

ACTIVATIONS = {
    "silu": lambda x: x * expit(x),
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * (1 + erf(x / 2**0.5)) / 2,
    "gelu_pytorch_tanh": lambda x: x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
}


KEEP = 90  # of 118 rows: one program for most tests


class Found(NamedTuple):
    out: jax.Array
    gate_up: jax.Array | None
    S: jax.Array | None


@partial(quick_jit, static_argnames=("activation", "keep", "implementation"))
def jitted(*arrays: object, **options: object) -> Found:
    *found, plan = smlm_glu(*arrays, **options)
    return Found(*found), plan.counters


def run(case: Case, activation: str = "silu", keep_rows: int = KEEP, implementation: str = "triton") -> Found:
    options = {"y": case.y, "activation": activation, "implementation": implementation}
    found, counters = jitted(case.x, case.A, case.B, training(case.plan, keep_rows), **options)
    assert not np.asarray(counters).any()
    return found


@pytest.mark.also_gpu
@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize(
    "name", ["silu", "gelu", *(pytest.param(name, marks=pytest.mark.slow) for name in ("relu", "gelu_pytorch_tanh"))]
)
def test_it_is_the_formula(name: str, implementation: str) -> None:
    case = CASES["two halves"]()
    gate_up = case.y + brute_force(case)
    found = run(case, name, implementation=implementation)
    assert_close(found.out, ACTIVATIONS[name](gate_up[:, :80]) * gate_up[:, 80:], "f32")
    assert_close(found.gate_up, gate_up[:KEEP], "f32")
    assert_close(found.S, brute_S(case, KEEP), "f32")


@pytest.mark.slow
def test_rounds_like_the_kernels_one_after_the_other() -> None:
    """In bfloat16 gate, up, act(gate) and the product are each rounded once: equality, not a tolerance."""
    case = make_case(MIXED, MIXED_ROWS, 64, (96, 96), dtype=jnp.bfloat16)
    found = run(case, keep_rows=MIXED_ROWS)
    options = {"out_features": (96, 96), "implementation": "triton"}
    y = quick_jit(partial(smlm_fwd, **options))(case.x, case.A, case.B, case.plan, y=case.y)[0]
    np.testing.assert_array_equal(found.gate_up, y)
    gate, up = (half.astype(jnp.float32) for half in jnp.split(y, 2, axis=1))
    want = jax.nn.silu(gate).astype(jnp.bfloat16).astype(jnp.float32) * up
    np.testing.assert_array_equal(found.out, want.astype(jnp.bfloat16))


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_nothing_is_kept_unless_asked_for(implementation: str) -> None:
    case = CASES["two halves"]()
    f = partial(smlm_glu, y=case.y, activation="silu", implementation=implementation)
    arrays = (case.x, case.A, case.B)
    assert jax.eval_shape(f, *arrays, case.plan)[1:3] == (None, None)
    _, gate_up, S, _ = jax.eval_shape(partial(f, keep=False), *arrays, training(case.plan, 10))
    assert gate_up is None
    assert S.shape == (10, 2, 3, RANK_PAGE)


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
    smlm_glu_triton.clear_cache()


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
    with pytest.raises(ValueError, match=r"plan.pack_rows: got 1 packs of 119 rows, expected 0 to x's 118 rows"):
        run(case, keep_rows=119)
    with pytest.raises(ValueError, match="activation: got 'tanh', expected one of"):
        run(case, "tanh")
    case.y = case.y[:, :-2]
    with pytest.raises(ValueError, match="out_features: got"):
        run(case)
    case.y = case.y[0]
    with pytest.raises(ValueError, match=r"y: got shape \(158,\), expected 2 dimensions"):
        run(case)


def kernels(rows: int, activation: str, implementation: str | None) -> str:
    case = make_case([(0, rows, (1,))], rows, 32, (16, 16))
    f = partial(smlm_glu, y=case.y, activation=activation, implementation=implementation)
    return str(jax.make_jaxpr(f)(case.x, case.A, case.B, case.plan))


def test_the_fusion_is_for_many_rows_and_for_kernels_that_have_the_activation() -> None:
    many = FEW_ROWS + 1
    assert "smlm_gate" in kernels(many, "silu", "triton")
    assert "smlm_delta_expand" in kernels(FEW_ROWS, "silu", "triton")
    assert "smlm_expand" in kernels(many, "gelu", "triton")
    for text in (kernels(FEW_ROWS, "silu", "triton"), kernels(many, "gelu", "triton")):
        assert "smlm_gate" not in text
    assert "pallas_call" not in kernels(many, "silu", "xla")
    assert jax.default_backend() != "cpu" or "pallas_call" not in kernels(many, "silu", None)
