"""gate and up with their adapters and the activation in one kernel, against the formula; S for the backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from pallas_kernels.smlm import RANK_PAGE, SmlmPlan, gate_fused, plan_shapes, smlm, smlm_gated
from pallas_kernels.smlm import triton as launches
from pallas_kernels.smlm.gated import smlm_gated_triton
from tests.kernels.smlm_cases import MIXED, MIXED_ROWS, Case, brute_force, make_case
from tests.kernels.test_smlm_triton import pretend_gpu
from tests.tolerances import assert_close

ACTIVATIONS = {
    "silu": lambda x: x * expit(x),
    "relu": lambda x: np.maximum(x, 0),
    "gelu_pytorch_tanh": lambda x: x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
}


def run(case: Case, activation: str = "silu", keep_rows: int = 0, **options: object) -> tuple:
    def f(x, A, B, plan, y):
        return smlm_gated(x, A, B, SmlmPlan(*plan), y=y, activation=activation, keep_rows=keep_rows, **options)

    return jax.jit(f)(case.x, case.A, case.B, tuple(case.plan), case.y)


def brute_S(case: Case, rows: int) -> np.ndarray:
    """S by the formula, float64; [rows, n, MP, R], zero where there is no page."""
    x, A = case.x.astype(np.float64), case.A.astype(np.float64)
    S = np.zeros((rows, len(case.out_features), case.plan.tile_pages.shape[1], RANK_PAGE))
    for first, count, pages in case.segments:
        for t in range(first, min(rows, first + count)):
            for m, page in enumerate(pages):
                S[t, :, m] = (A[page] @ x[t]).reshape(-1, RANK_PAGE)
    return S


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_kernel_is_the_formula(name: str) -> None:
    case = make_case([*MIXED, (113, 5, (8,))], MIXED_ROWS, 48, (80, 80))
    gate_up = case.y + brute_force(case)
    found = run(case, name, keep_rows=90)
    assert_close(found.out, ACTIVATIONS[name](gate_up[:, :80]) * gate_up[:, 80:], "f32")
    assert_close(found.kept, gate_up[:90], "f32")
    assert_close(found.S, brute_S(case, 90), "f32")


def test_rounds_like_the_kernels_one_after_the_other() -> None:
    """In bfloat16 gate, up, act(gate) and the product are each rounded once: equality, not a tolerance."""
    case = make_case(MIXED, MIXED_ROWS, 64, (96, 96), dtype=jnp.bfloat16)
    found = run(case, keep_rows=MIXED_ROWS)
    y = smlm(case.x, case.A, case.B, case.plan, y=case.y, out_features=(96, 96), implementation="triton")
    np.testing.assert_array_equal(found.kept, y)
    gate, up = (half.astype(jnp.float32) for half in jnp.split(y, 2, axis=1))
    want = jax.nn.silu(gate).astype(jnp.bfloat16).astype(jnp.float32) * up
    np.testing.assert_array_equal(found.out, want.astype(jnp.bfloat16))


def test_nothing_is_kept_unless_asked_for() -> None:
    case = make_case(MIXED, MIXED_ROWS, 48, (80, 80))
    assert run(case)[1:] == (None, None)
    found = run(case, keep_rows=10, keep_y=False)
    assert found.kept is None
    assert found.S.shape == (10, 2, 3, RANK_PAGE)


@pytest.mark.parametrize("segments", [[], [(0, MIXED_ROWS, (1,))], [(5, 1, (2, 3, 4))]], ids=["none", "all", "one"])
def test_every_row_is_computed_whoever_has_an_adapter(segments: list) -> None:
    case = make_case(segments, MIXED_ROWS, 48, (80, 80))
    case.A[0], case.B[0] = np.nan, np.nan  # page 0 means none: it is never read
    gate_up = case.y + brute_force(case)
    assert_close(run(case).out, gate_up[:, :80] * expit(gate_up[:, :80]) * gate_up[:, 80:], "f32")


def test_a_bad_adapter_stays_with_its_rows() -> None:
    case = make_case(MIXED, MIXED_ROWS, 48, (80, 80))
    want = run(case, keep_rows=MIXED_ROWS)
    case.A[2] = np.nan  # the second page of rows 0 to 69
    found = run(case, keep_rows=MIXED_ROWS)
    for got, expected in zip(found, want, strict=True):
        np.testing.assert_array_equal(got[70:], expected[70:])
    assert np.isnan(found.out[:70]).all()


def test_a_bounded_grid_walks_all_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(MIXED, MIXED_ROWS, 48, (80, 80))
    want = run(case, keep_rows=60)
    monkeypatch.setattr(launches, "MAX_PROGRAMS", 3)
    smlm_gated_triton.clear_cache()
    got = run(case, keep_rows=60)
    smlm_gated_triton.clear_cache()
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize(("size", "out_features"), [(64, (48,)), (48, (64, 16, 16)), (1040, (80, 80))])
def test_smlm_returns_S(size: int, out_features: tuple[int, ...], implementation: str) -> None:
    case = make_case(MIXED, MIXED_ROWS, size, out_features)
    options = {"out_features": out_features, "implementation": implementation}
    y, S = smlm(case.x, case.A, case.B, case.plan, y=case.y, S_rows=90, **options)
    np.testing.assert_array_equal(y, smlm(case.x, case.A, case.B, case.plan, y=case.y, **options))
    assert_close(S, brute_S(case, 90), "f32")
    assert not np.asarray(S)[70:75].any()  # rows without adapter


def test_bad_arguments_are_refused() -> None:
    case = make_case(MIXED, MIXED_ROWS, 48, (80, 80))
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


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_lowers_for_cuda(name: str, dtype: jnp.dtype) -> None:
    shapes = [(1568, 4096), (65, 32, 4096), (65, 16, 28672), (1568, 28672)]
    x, A, B, y = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)

    def f(x, A, B, plan, y):
        return smlm_gated_triton(x, A, B, plan, y, name, 1024, interpret=False)

    with pretend_gpu():
        traced = jax.jit(f).trace(x, A, B, plan_shapes(1568, 130, 4, 62), y)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 2
