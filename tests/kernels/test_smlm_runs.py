"""The backward of SMLM for any plan against the reference's autodiff: every implementation; bits, NaN, refusals."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.smlm import SmlmPlan, build_plan, smlm_ref
from pallas_kernels.smlm.pack_tuning import Block, DyConfig, XConfig
from pallas_kernels.smlm.run_list import runs_of
from pallas_kernels.smlm.runs import backward_runs
from pallas_kernels.smlm.runs_triton import runs_dy_triton, runs_x_triton
from tests.kernels.quick import quick_jit
from tests.kernels.smlm_cases import Case, Segments, brute_S, make_case, rows_of_nobody
from tests.tolerances import assert_close

TRITON_SLOW = ["xla", pytest.param("triton", marks=pytest.mark.slow)]
BOTH = pytest.mark.parametrize("implementation", ["xla", "triton"])
ROWS, SIZE, OUTS = 150, 80, (48, 16)
RANKS_1_TO_64 = {1: (1,), 16: (2,), 17: (3, 4), 48: (5, 7, 6), 64: (8, 9, 10, 11)}
"""Pages of an adapter of each rank; page 1 has one rank that is not zero."""

SEGMENTS: dict[str, Segments] = {
    "mixed": [
        (0, 70, (5, 7, 6)), (70, 5, ()), (75, 1, (1,)), (80, 16, (8, 9, 10, 11)), (96, 17, (3, 4)), (140, 3, (2,)),
    ],
    "two segments of one adapter": [(3, 20, (2,)), (23, 7, (3, 4)), (30, 37, (2,)), (100, 2, (2,))],
    "neighbours of one adapter": [(5, 9, (3, 4)), (14, 30, (3, 4)), (44, 1, (3, 4)), (45, 20, (3,))],
    "one adapter has all rows": [(0, ROWS, (8, 9, 10, 11))],
    "one token": [(77, 1, (1,))],
    "empty": [],
}  # fmt: skip


def case_of(segments: Segments, dtype: Any = np.float32) -> Case:
    """The shapes of all cases: one compilation."""
    sizes = {"max_pages": 4, "num_tiles": 24, "num_wide": 30, "num_pages": 12}
    case = make_case(segments, ROWS, SIZE, OUTS, dtype=dtype, **sizes)
    case.A.reshape(-1, len(OUTS), 16, SIZE)[1, :, 1:], case.B[1, 1:] = 0, 0
    return case


def kept(case: Case) -> np.ndarray:
    """S of all rows, as the forward keeps it."""
    return brute_S(case, ROWS).astype(case.x.dtype)


def run(
    case: Case, implementation: str, dx: jax.Array | None = None, S: jax.Array | None = None
) -> tuple[np.ndarray, ...]:
    """dX, dA, dB, pages; y is the gradient."""
    S = kept(case) if S is None else S
    return jax.tree.map(np.asarray, quick(S, case.x, case.A, case.B, case.plan, case.y, dx, implementation))


@quick_jit
def _reference(x: jax.Array, A: jax.Array, B: jax.Array, plan: SmlmPlan, dy: jax.Array) -> tuple[jax.Array, ...]:
    return jax.vjp(lambda x, A, B: smlm_ref(x, A, B, plan, OUTS), x, A, B)[1](dy)


def reference(case: Case) -> tuple[jax.Array, ...]:
    """dX, dA and dB of the pools, in float32."""
    x, A, B, dy = (a.astype(np.float32) for a in (case.x, case.A, case.B, case.y))
    return _reference(x, A, B, case.plan, dy)


def _quick(
    S: jax.Array, x: jax.Array, A: jax.Array, B: jax.Array, plan: SmlmPlan, dy: jax.Array, dx: jax.Array | None,
    implementation: str,
) -> tuple[jax.Array, ...]:  # fmt: skip
    return backward_runs(S, x, A, B, plan, dy, out_features=OUTS, dx=dx, implementation=implementation)


quick = quick_jit(_quick, static_argnums=7)


def scatter(delta: np.ndarray, pages: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """Gradients of the pool's pages: those of runs, one after the other. Where there is no page nothing is read."""
    total = np.zeros(pool.shape, np.float32)
    for g, m in zip(*np.nonzero(pages), strict=True):
        total[pages[g, m]] += delta[g, m]
    return total


def check(case: Case, implementation: str) -> None:
    dx, dA, dB, pages = run(case, implementation)
    assert dx.dtype == case.x.dtype and dA.dtype == dB.dtype == np.float32
    tolerance = "f32" if case.x.dtype == np.float32 else "bf16_grad"
    got = (dx, scatter(dA, pages, case.A), scatter(dB, pages, case.B))
    for one, other in zip(got, reference(case), strict=True):
        scale = max(1.0, float(jnp.abs(other).max()))
        assert_close(one.astype(np.float32) / scale, other / scale, tolerance)
    assert not dx[rows_of_nobody(case)].astype(np.float32).any()


@pytest.mark.also_gpu
@BOTH
@pytest.mark.parametrize("name", SEGMENTS)
def test_gradients_are_those_of_the_reference(name: str, implementation: str) -> None:
    check(case_of(SEGMENTS[name]), implementation)


@pytest.mark.also_gpu
@pytest.mark.parametrize("implementation", TRITON_SLOW)
def test_bfloat16_is_rounded_where_the_forward_rounds(implementation: str) -> None:
    check(case_of(SEGMENTS["mixed"], jnp.bfloat16), implementation)


@st.composite
def plans(draw: st.DrawFn) -> Segments:
    """Segments of any lengths, of adapters of ranks 1 to 64 that come more than once, with rows of none between."""
    count = draw(st.integers(1, 6))
    ends = sorted(draw(st.lists(st.integers(0, ROWS), min_size=2 * count, max_size=2 * count)))
    pages = draw(st.lists(st.sampled_from([(), *RANKS_1_TO_64.values()]), min_size=count, max_size=count))
    # Half of the gaps are closed, so that neighbours meet.
    closed = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    firsts = [ends[2 * i - 1] if i and closed[i] else ends[2 * i] for i in range(count)]
    return [(first, ends[2 * i + 1] - first, pages[i]) for i, first in enumerate(firsts)]


@BOTH
@settings(max_examples=15, deadline=None)
@given(segments=plans())
def test_any_plan_has_the_gradients_of_the_reference(implementation: str, segments: Segments) -> None:
    check(case_of(segments), implementation)


listed = quick_jit(runs_of)


@settings(deadline=None)
@given(segments=plans())
def test_runs_are_the_longest_stretches_of_rows_of_one_adapter(segments: Segments) -> None:
    plan = build_plan(segments, ROWS, 24, 4, 30)
    owners: list[tuple[int, ...]] = [()] * ROWS
    for first, rows, pages in segments:
        owners[first : first + rows] = [pages] * rows
    starts = [t for t in range(ROWS) if owners[t] and (t == 0 or owners[t - 1] != owners[t])]
    ends = [t for t in range(1, ROWS + 1) if owners[t - 1] and (t == ROWS or owners[t] != owners[t - 1])]
    runs, count = jax.tree.map(np.asarray, listed(plan)), len(starts)
    assert runs.pages.shape == (24, 4)
    assert runs.row.tolist()[:count] == starts and (runs.row + runs.length).tolist()[:count] == ends
    assert [tuple(p[p > 0].tolist()) for p in runs.pages[:count]] == [owners[t] for t in starts]
    assert not any(a[count:].any() for a in (runs.row, runs.length, runs.pages))


PLACES: dict[str, tuple[int, Segments]] = {
    "alone": (0, [(0, 70, (5, 6, 7))]),
    "off the tiles": (41, [(41, 70, (5, 6, 7))]),
    "among others": (27, [(0, 9, (1,)), (10, 17, (2,)), (27, 70, (5, 6, 7)), (97, 40, (8, 9, 10, 11))]),
    "again": (80, [(0, 66, (5, 6, 7)), (80, 70, (5, 6, 7))]),
}


@pytest.mark.also_gpu
@pytest.mark.bits
@BOTH
def test_a_run_keeps_its_bits_wherever_it_lies(implementation: str) -> None:
    own = case_of(PLACES["alone"][1])
    found = []
    for first, segments in PLACES.values():
        case = case_of(segments)
        case.x[first : first + 70], case.y[first : first + 70] = own.x[:70], own.y[:70]
        dx, dA, dB, pages = run(case, implementation)
        group = np.flatnonzero((pages == [5, 6, 7, 0]).all(axis=1))[-1]
        found.append((dx[first : first + 70], dA[group, :3], dB[group, :3]))
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(one, same)


@pytest.mark.also_gpu
@BOTH
def test_nan_stays_with_its_adapter(implementation: str) -> None:
    """In rows, what was kept of them, and pages: of an adapter, of rows without one, and of page 0."""
    segments = [(0, 40, (1,)), (40, 30, (2, 3)), (70, 30, (4,)), (105, 21, (2, 3)), (126, 20, (5, 6, 7))]
    case = case_of(segments)
    S = np.array(kept(case))
    clean = run(case, implementation, S=S)
    bad_rows = np.r_[40:70, 100:126, 146:ROWS]
    for array in (case.x, case.y):
        array[bad_rows] = np.nan
    S[40:70, :, :2] = S[105:126, :, :2] = np.nan
    for pool in (case.A, case.B):
        pool[[0, 2, 3]] = np.inf
    dirty = run(case, implementation, S=S)
    pages = clean[3]
    np.testing.assert_array_equal(dirty[3], pages)
    good = (pages > 0) & (pages[:, :1] != 2)
    assert good.sum() == 5
    np.testing.assert_array_equal(np.delete(dirty[0], bad_rows, axis=0), np.delete(clean[0], bad_rows, axis=0))
    assert not dirty[0][rows_of_nobody(case)].any()
    for one, other in zip(dirty[1:3], clean[1:3], strict=True):
        np.testing.assert_array_equal(one[good], other[good])
        assert np.isnan(one[pages[:, 0] == 2][:, :2]).any(axis=(1, 2, 3)).all()


@pytest.mark.also_gpu
@BOTH
def test_dx_is_added_to_and_rows_of_no_adapter_keep_theirs(implementation: str) -> None:
    case = case_of(SEGMENTS["mixed"])
    given_dx = np.sin(case.x)
    nobody = rows_of_nobody(case)
    given_dx[nobody[0]], given_dx[nobody[1]] = np.nan, -0.0
    want, got = run(case, implementation), run(case, implementation, given_dx)
    np.testing.assert_array_equal(got[0][nobody].view(np.int32), given_dx[nobody].view(np.int32))
    assert_close(np.delete(got[0], nobody, axis=0), np.delete(given_dx + want[0], nobody, axis=0), "f32")
    used = want[3] > 0
    for one, other in zip(got[1:3], want[1:3], strict=True):
        np.testing.assert_array_equal(one[used], other[used])


@pytest.mark.parametrize("implementation", TRITON_SLOW)
def test_dx_may_be_a_function_of_dy(implementation: str) -> None:
    case = case_of(SEGMENTS["mixed"])
    W = np.random.default_rng(1).standard_normal((sum(OUTS), SIZE), np.float32)

    @quick_jit
    def called(S: jax.Array, x: jax.Array, A: jax.Array, B: jax.Array, plan: SmlmPlan, dy: jax.Array) -> jax.Array:
        function = lambda dy: dy @ W  # noqa: E731
        return backward_runs(S, x, A, B, plan, dy, out_features=OUTS, dx=function, implementation=implementation)[0]

    S = kept(case)
    got = called(S, case.x, case.A, case.B, case.plan, case.y)
    assert_close(got, run(case, implementation, jnp.asarray(case.y) @ W)[0], "f32")


@pytest.mark.slow
@pytest.mark.also_gpu
def test_every_cut_of_the_kernels_has_the_gradients_of_the_reference() -> None:
    """Several blocks and spans of columns, and tiles of fewer rows than a wide one."""
    case = case_of(SEGMENTS["mixed"])
    dy_config = DyConfig(Block(16, 32), Block(32, 16, 32), turns=2)
    x_config = XConfig(Block(16, 32), Block(16, 16, 32))

    @quick_jit
    def both(S: jax.Array, x: jax.Array, A: jax.Array, B: jax.Array, plan: SmlmPlan, dy: jax.Array) -> Any:
        runs = runs_of(plan)
        dS, dB = runs_dy_triton(B, S, dy, plan, runs, OUTS, config=dy_config)
        return *runs_x_triton(x, A, dS, None, plan, runs, config=x_config), dB, runs.pages

    S = kept(case)
    dx, dA, dB, pages = (np.asarray(a) for a in both(S, case.x, case.A, case.B, case.plan, case.y))
    got = (dx, scatter(dA, pages, case.A), scatter(dB, pages, case.B))
    for one, other in zip(got, reference(case), strict=True):
        scale = float(jnp.abs(other).max())
        assert_close(one / scale, other / scale, "f32")


def test_xla_gathers_no_page_per_row() -> None:
    case = case_of(SEGMENTS["mixed"])
    S = kept(case)
    text = quick.lower(S, case.x, case.A, case.B, case.plan, case.y, None, "xla").as_text()
    assert f"tensor<{ROWS}x{SIZE}xf32>" in text
    assert not re.search(rf"tensor<{ROWS}x(\d+x)+({SIZE}|{sum(OUTS)})xf32>", text)
    ref = jax.jit(lambda *a: smlm_ref(*a, OUTS)).lower(case.x, case.A, case.B, case.plan).as_text()
    assert re.search(rf"tensor<{ROWS}x(\d+x)+({SIZE}|{sum(OUTS)})xf32>", ref)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "S": ({"S": np.zeros((ROWS, 2, 1, 16), np.float32)}, ValueError, r"S: got shape .*\(150, 2, 4, 16\)"),
    "dy": ({"dy": np.zeros((ROWS, 48), np.float32)}, ValueError, r"dy: got shape \(150, 48\)"),
    "B": ({"B": np.zeros((3, 16, 80), np.float32)}, ValueError, r"B: got shape \(3, 16, 80\)"),
    "rows": ({"x": np.zeros((8, SIZE), np.float32)}, ValueError, r"S: got shape"),
    "dtype": ({"A": np.zeros((12, 32, SIZE), np.float16)}, TypeError, "A: got dtype float16, expected x's float32"),
    "dx": ({"dx": np.zeros((ROWS, 48), np.float32)}, ValueError, r"dx: got shape \(150, 48\)"),
    "implementation": ({"implementation": "mosaic"}, ValueError, "implementation: got 'mosaic'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name: str) -> None:
    changed, error, message = WRONG[name]
    case = case_of(SEGMENTS["empty"])
    arrays = {
        "S": np.zeros((ROWS, 2, 4, 16), np.float32), "x": case.x, "A": case.A, "B": case.B, "plan": case.plan,
        "dy": case.y, "implementation": "xla",
    } | changed  # fmt: skip
    with pytest.raises(error, match=message):
        backward_runs(out_features=OUTS, **arrays)
