"""The forward against a float64 brute force, in every form that it takes; bits, NaN, refusals."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loquetier_jax import config
from pallas_kernels import SmlmPlan, build_plan, smlm, smlm_fwd
from pallas_kernels.pack_attention import PACK_ALIGN
from pallas_kernels.smlm import FEW_ROWS, RANK_PAGE, TILE, delta, smlm_ref
from tests.kernels.quick import quick_jit
from tests.kernels.smlm_cases import (
    CASES,
    MIXED,
    MIXED_ROWS,
    Case,
    brute_force,
    brute_S,
    make_case,
    rows_of_nobody,
    training,
)
from tests.tolerances import assert_close

BOTH = pytest.mark.parametrize("implementation", ["xla", "triton"])
S_ROWS = 90
STATIC = ("out_features", "implementation")
jitted = jax.jit(smlm_fwd, static_argnames=STATIC)
quick = quick_jit(smlm_fwd, static_argnames=STATIC)
beside = quick_jit(lambda *args, **options: smlm_fwd(*args, **options), static_argnames=STATIC)


def run(
    case: Case, implementation: str, *, y: bool = True, S_rows: int = 0, f: Callable[..., jax.Array] = quick
) -> tuple[np.ndarray, np.ndarray | None]:
    """The sum (the delta without y), and S of the first rows."""
    options = {"out_features": case.out_features, "implementation": implementation}
    out, S, plan = f(case.x, case.A, case.B, training(case.plan, S_rows), y=case.y if y else None, **options)
    assert not np.asarray(plan.counters).any()
    return np.asarray(out), S if S is None else np.asarray(S)


@pytest.fixture
def run_beside(monkeypatch: pytest.MonkeyPatch) -> Callable[[Case], np.ndarray]:
    """As `run`, as if every case had few rows: kernels compute the delta beside whatever makes y."""
    monkeypatch.setattr(delta, "FEW_ROWS", MIXED_ROWS)
    return lambda case: run(case, "triton", f=beside)[0]


def tolerance(case: Case) -> str:
    return "f32" if case.x.dtype == np.float32 else "bf16"


@pytest.mark.also_gpu
@BOTH
@pytest.mark.parametrize("name", CASES)
def test_the_op_is_the_formula(name: str, implementation: str) -> None:
    case = CASES[name]()
    S_rows = min(S_ROWS, len(case.x))
    y, S = run(case, implementation, S_rows=S_rows)
    assert S is not None and y.dtype == S.dtype == case.x.dtype
    assert_close(y, case.y.astype(np.float64) + brute_force(case), tolerance(case))
    assert_close(S, brute_S(case, S_rows), tolerance(case))
    nobody = rows_of_nobody(case)
    np.testing.assert_array_equal(y[nobody], case.y[nobody])
    assert not S[nobody[nobody < S_rows]].any()


@pytest.mark.also_gpu
@pytest.mark.parametrize("name", CASES)
def test_the_delta_beside_the_gemm_is_the_formula(name: str, run_beside: Callable[[Case], np.ndarray]) -> None:
    case = CASES[name]()
    got = run_beside(case)
    assert_close(got, case.y.astype(np.float64) + brute_force(case), tolerance(case))
    nobody = rows_of_nobody(case)
    np.testing.assert_array_equal(got[nobody], case.y[nobody])


@BOTH
def test_without_y_it_is_the_delta_alone(implementation: str) -> None:
    case = CASES["one target"]()
    got, S = run(case, implementation, y=False)
    assert S is None
    assert_close(got, brute_force(case), "f32")
    np.testing.assert_array_equal(got[rows_of_nobody(case)], 0)


@BOTH
def test_y_does_not_depend_on_whether_S_is_returned(implementation: str) -> None:
    case = CASES["one target"]()
    np.testing.assert_array_equal(run(case, implementation)[0], run(case, implementation, S_rows=S_ROWS)[0])


def test_reference_is_the_formula() -> None:
    case = CASES["targets"]()
    found = quick_jit(smlm_ref, static_argnums=4)(case.x, case.A, case.B, case.plan, case.out_features)
    assert_close(found, brute_force(case), "f32")


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_layout_of_segments(data: st.DataObject) -> None:
    rows, segments = 60, []
    first = 0
    while first < rows:
        length = data.draw(st.integers(0, min(35, rows - first)))
        count = data.draw(st.integers(0, 3))
        pages = tuple(data.draw(st.permutations(range(1, 9)))[:count])
        segments.append((first, length, pages))
        first += length + data.draw(st.integers(0, 3))
        if len(segments) == 10:
            break
    case = make_case(data.draw(st.permutations(segments)), rows, 32, (16, 32), num_tiles=64)
    for implementation in ("xla", "triton"):
        assert_close(run(case, implementation)[0], case.y + brute_force(case), "f32")


@pytest.mark.parametrize("form", ["xla", "triton", "beside"])
def test_nan_and_inf_stay_with_their_rows_and_pages(form: str, run_beside: Callable[[Case], np.ndarray]) -> None:
    case = CASES["one target"]()
    f = run_beside if form == "beside" else lambda case: run(case, form)[0]
    clean = f(case)
    case.A[[3, 8]], case.B[7, 0] = np.nan, np.inf  # page 8 belongs to nobody
    case.x[3], case.x[72], case.x[117] = np.nan, np.inf, np.nan  # the last two have no adapter
    got = f(case)
    dirty = [3, *range(75, 79), *range(96, 113)]
    others = [t for t in range(MIXED_ROWS) if t not in dirty]
    np.testing.assert_array_equal(got[others], clean[others])
    assert not np.isfinite(got[dirty]).all(axis=1).any()


@pytest.mark.bits
@pytest.mark.parametrize("implementation", ["xla", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("size", [32, pytest.param(1040, marks=pytest.mark.slow)])
def test_a_row_keeps_its_bits_wherever_it_is_placed(size: int, implementation: str) -> None:
    """Among rows of nobody (few rows take another form) or of others, anywhere in a tile, under any NT and MP."""
    pages = (5, 2)
    base = make_case([(0, 1, pages)], FEW_ROWS + 1, size, (32, 16), num_tiles=1, max_pages=2)
    expected = run(base, implementation, f=jitted)[0][0]
    crowd = [(0, 21, (1,)), (21, 1, (4, 3, 2)), (24, 13, (2, 5))]
    for offset, num_tiles, max_pages in ((0, 9, 3), (1, 9, 3), (7, 9, 3), (15, 9, 3), (16, 40, 5)):
        segments = [*crowd, (40, offset + 1, pages), (40 + offset + 1, 4, pages), (66, 5, (8,))]
        case = make_case(
            segments, 73, size, (32, 16), num_tiles=num_tiles, max_pages=max_pages, seed=offset + 1
        )
        case.A[[*pages]], case.B[[*pages]] = base.A[[*pages]], base.B[[*pages]]
        case.x[40 + offset], case.y[40 + offset] = base.x[0], base.y[0]
        np.testing.assert_array_equal(run(case, implementation, f=jitted)[0][40 + offset], expected)


def kernels(rows: int, implementation: str, *, y: bool = True, S_rows: int = 0) -> str:
    """The names in a trace of the forward."""
    case = make_case([(0, rows, (1,))], rows, 32, (16,))
    plan, options = training(case.plan, S_rows), {"out_features": (16,), "implementation": implementation}
    return str(jax.make_jaxpr(lambda y: smlm_fwd(case.x, case.A, case.B, plan, y=y, **options))(case.y if y else None))


def test_few_rows_take_the_delta_beside_the_gemm() -> None:
    assert "smlm_delta_expand" in kernels(FEW_ROWS, "triton")
    for text in (
        kernels(FEW_ROWS + 1, "triton"),
        kernels(FEW_ROWS, "triton", y=False),
        kernels(FEW_ROWS, "triton", S_rows=16),
    ):
        assert "smlm_expand" in text and "smlm_delta" not in text
    assert "pallas_call" not in kernels(FEW_ROWS, "xla")


def test_the_runtime_knows_the_same_sizes() -> None:
    assert (config.RANK_PAGE, config.BLOCK, config.PACK_ALIGN) == (RANK_PAGE, TILE, PACK_ALIGN)


def test_bad_arguments_are_refused_with_both_values() -> None:
    case = make_case(MIXED, MIXED_ROWS, 64, (32, 16))
    x, A, B, y = (jnp.asarray(a) for a in (case.x, case.A, case.B, case.y))

    def call(
        x: jax.Array = x, A: jax.Array = A, B: jax.Array = B, plan: SmlmPlan = case.plan,
        out_features: tuple[int, ...] = (32, 16), **kwargs: object,
    ) -> None:  # fmt: skip
        smlm(x, A, B, plan, out_features=out_features, **kwargs)

    with pytest.raises(ValueError, match=r"A: got shape \(9, 32, 48\), expected \(9, 32, 64\)"):
        call(A=A[:, :, :48])
    with pytest.raises(ValueError, match=r"B: got shape \(9, 16, 48\), expected \(9, 16, 64\)"):
        call(out_features=(32, 32))
    with pytest.raises(ValueError, match=r"out_features: got \(32, 15\), expected positive multiples of 16"):
        call(out_features=(32, 15))
    with pytest.raises(ValueError, match="x: got 40 input features"):
        call(x=x[:, :40])
    with pytest.raises(ValueError, match="got a plan of 118 rows, expected x's 117"):
        call(x=x[:-1], y=y[:-1])
    with pytest.raises(ValueError, match=r"plan.wide_row: got shape \(3,\), expected \(34,\)"):
        call(plan=replace(case.plan, wide_row=case.plan.wide_row[:3]))
    with pytest.raises(ValueError, match=r"plan.pack_rows: got 1 packs of 119 rows, expected 0 to x's 118 rows"):
        call(plan=training(case.plan, 119))
    with pytest.raises(TypeError, match=r"plan.used: got dtype int64, expected int32"):
        call(plan=replace(case.plan, used=case.plan.used.astype(np.int64)))
    with pytest.raises(TypeError, match="y: got dtype bfloat16, expected x's float32"):
        call(y=y.astype(jnp.bfloat16))
    for name in ("cuda", "mosaic"):
        with pytest.raises(ValueError, match=f"implementation: got '{name}', expected one of"):
            call(implementation=name)


def test_one_compile_serves_every_plan_of_a_shape() -> None:
    case = make_case(MIXED, MIXED_ROWS, 32, (16,))
    traces = []

    @jax.jit
    def step(plan: SmlmPlan) -> jax.Array:
        traces.append(1)
        return smlm(jnp.asarray(case.x), jnp.asarray(case.A), jnp.asarray(case.B), plan, out_features=(16,))

    for segments in (MIXED, MIXED[:2], []):
        step(build_plan(segments, MIXED_ROWS, 16, 3))
    assert len(traces) == 1
