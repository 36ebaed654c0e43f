"""jax.grad through `smlm` on any plan, every implementation, against autodiff of the reference."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import SmlmPlan, scatter_add_pages, smlm, smlm_bwd, smlm_fwd
from pallas_kernels.smlm import pack_plan, smlm_ref
from tests.kernels.quick import quick_jit
from tests.kernels.smlm_cases import Case, Segments, brute_force, make_case, rows_of_nobody
from tests.tolerances import assert_close

DTYPES = [pytest.param(np.float32, id="f32"), pytest.param(jnp.bfloat16, id="bf16", marks=pytest.mark.slow)]
BOTH = pytest.mark.parametrize("implementation", ["xla", "triton"])
ROWS, SIZE, OUTS, PAGES = 100, 48, (32, 16), 12
SEGMENTS: dict[str, Segments] = {
    "several segments of one adapter": [(0, 37, (5, 7, 6)), (37, 5, ()), (45, 20, (2,)), (65, 9, (5, 7, 6))],
    "ranks 1 to 64": [(0, 33, (1,)), (33, 3, (2, 3)), (40, 16, (8, 9, 10, 11)), (60, 17, (5, 7, 6)), (98, 2, (4,))],
    "one token": [(77, 1, (1,))],
    "empty": [],
}


def case_of(segments: Segments, dtype: Any = np.float32, seed: int = 0) -> Case:
    """The shapes of all cases: one compilation. Page 1 has one rank that is not zero, page 0 is NaN."""
    sizes = {"max_pages": 4, "num_tiles": 20, "num_wide": 24, "num_pages": PAGES}
    case = make_case(segments, ROWS, SIZE, OUTS, dtype=dtype, seed=seed, **sizes)
    case.A.reshape(-1, len(OUTS), 16, SIZE)[1, :, 1:], case.B[1, 1:] = 0, 0
    case.A[0], case.B[0] = np.nan, np.nan
    return case


@partial(quick_jit, static_argnames="implementation")
def gradients(
    x: jax.Array, A: jax.Array, B: jax.Array, y: jax.Array, plan: SmlmPlan, dout: jax.Array, implementation: str
) -> tuple[jax.Array, ...]:
    """Of x, A, B and y."""
    f = partial(smlm, out_features=OUTS, implementation=implementation)
    return jax.vjp(lambda x, A, B, y: f(x, A, B, plan, y=y), x, A, B, y)[1](dout)


@quick_jit
def reference(
    x: jax.Array, A: jax.Array, B: jax.Array, y: jax.Array, plan: SmlmPlan, dout: jax.Array
) -> tuple[jax.Array, ...]:
    """In float32."""
    x, A, B, y, dout = (a.astype(jnp.float32) for a in (x, A, B, y, dout))
    return jax.vjp(lambda x, A, B, y: y + smlm_ref(x, A, B, plan, OUTS), x, A, B, y)[1](dout)


def check(case: Case, implementation: str) -> None:
    dout = np.random.default_rng(5).normal(size=case.y.shape).astype(case.x.dtype)
    arrays = (case.x, case.A, case.B, case.y)
    got, want = gradients(*arrays, case.plan, dout, implementation), reference(*arrays, case.plan, dout)
    f32 = case.x.dtype == np.float32
    for one, other, like in zip(got, want, arrays, strict=True):
        assert (one.shape, one.dtype) == (like.shape, like.dtype)
        one, other = np.asarray(one, np.float32), np.asarray(other)
        scale = 1.0 if f32 else max(1.0, np.abs(other).max())
        assert_close(one / scale, other / scale, "f32" if f32 else "bf16_grad")
    # Nothing flows into the page of nobody or through rows of nobody, and y's gradient is dout itself.
    assert not np.asarray(got[1])[0].any() and not np.asarray(got[2])[0].any()
    assert not np.asarray(got[0])[rows_of_nobody(case)].any()
    np.testing.assert_array_equal(got[3], dout)


@pytest.mark.also_gpu
@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SEGMENTS)
def test_gradients_are_those_of_the_reference(name: str, dtype: Any, implementation: str) -> None:
    check(case_of(SEGMENTS[name], dtype), implementation)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_gradients_on_any_plan(data: st.DataObject) -> None:
    """Adapters of 0 to 4 pages of their own, each in any number of segments."""
    adapters = [(), (1,), (2,), (3, 4), (5, 7, 6), (8, 9, 10, 11)]
    first, segments = 0, []
    while first < ROWS and len(segments) < 8:
        length = data.draw(st.integers(0, min(40, ROWS - first)))
        segments.append((first, length, data.draw(st.sampled_from(adapters))))
        first += length + data.draw(st.integers(0, 3))
    case = case_of(segments, seed=data.draw(st.integers(0, 3)))
    for implementation in ("xla", "triton"):
        check(case, implementation)


@BOTH
def test_the_loss_is_linear_in_B(implementation: str) -> None:
    """<dB, B> is the loss: the gradient against the formula in float64, not the reference."""
    case = case_of(SEGMENTS["ranks 1 to 64"])
    dout = np.random.default_rng(6).normal(size=case.y.shape).astype(np.float32)
    dB = gradients(case.x, case.A, case.B, case.y, case.plan, dout, implementation)[2]
    assert_close(np.vdot(dB[1:], case.B[1:]), np.vdot(dout, brute_force(case)), "f32_buckets")


def packs_of(packs: int = 3, rows: int = 32, dtype: Any = np.float32) -> tuple[Case, SmlmPlan]:
    """Packs one below the other, the first and the last of one adapter."""
    pages = np.array([[2, 5], [3, 0], [2, 5]], np.int32)[:packs]
    case = make_case([], packs * rows, SIZE, OUTS, num_pages=PAGES, dtype=dtype)
    return case, jax.tree.map(jnp.asarray, pack_plan(pages, rows))


@pytest.mark.also_gpu
@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
def test_packs_are_the_groups_of_their_plan(dtype: Any, implementation: str) -> None:
    """Bits: what `smlm_fwd` keeps, through `smlm_bwd`, summed pack after pack and rounded once."""
    case, plan = packs_of(dtype=dtype)
    x, A, B, dout = (jnp.asarray(a) for a in (case.x, case.A, case.B, case.y))
    options = {"out_features": OUTS, "implementation": implementation}

    @quick_jit
    def by_hand(x: jax.Array, A: jax.Array, B: jax.Array) -> tuple[jax.Array, ...]:
        S = smlm_fwd(x, A, B, plan, **options)[1]
        dx, *deltas = smlm_bwd(S, x, A, B, plan, dout, **options)
        pools = [jnp.zeros(a.shape, jnp.float32) for a in (A, B)]
        return dx, *scatter_add_pages(pools, plan.pack_pages, deltas, implementation=implementation)

    @quick_jit
    def grad(x: jax.Array, A: jax.Array, B: jax.Array) -> tuple[jax.Array, ...]:
        return jax.vjp(lambda *a: smlm(*a, plan, **options), x, A, B)[1](dout)

    for one, other in zip(grad(x, A, B), by_hand(x, A, B), strict=True):
        np.testing.assert_array_equal(one, other.astype(dtype))


@pytest.mark.parametrize("packs", [False, True])
@BOTH
def test_no_row_holds_pages_of_its_own(implementation: str, packs: bool) -> None:
    """No array of [rows, ranks, in] or [rows, ranks, out] is formed: that would be gigabytes."""
    case, plan = packs_of() if packs else (case_of(SEGMENTS["ranks 1 to 64"]), None)
    plan = case.plan if plan is None else plan

    def f(x: jax.Array, A: jax.Array, B: jax.Array) -> jax.Array:
        return smlm(x, A, B, plan, out_features=OUTS, implementation=implementation).sum()

    text = jax.jit(jax.grad(f, argnums=(0, 1, 2))).lower(case.x, case.A, case.B).as_text()
    assert not per_row(text, len(case.x))


def per_row(text: str, rows: int) -> list[str]:
    """Shapes of arrays that hold more than a row and its S for each of so many rows."""
    shapes = [[int(n) for n in s.split("x")[:-1]] for s in re.findall(r"tensor<([\dx]+x[a-z]\w*)>", text)]
    return [str(s) for s in shapes if s and s[0] == rows and np.prod(s[1:]) >= 16 * min(SIZE, *OUTS)]


@pytest.mark.mutation
def test_pages_gathered_for_every_row_would_be_seen() -> None:
    case = case_of(SEGMENTS["ranks 1 to 64"])
    f = jax.grad(lambda x, A, B: smlm_ref(x, A, B, case.plan, OUTS).sum())
    assert per_row(jax.jit(f).lower(case.x, case.A, case.B).as_text(), ROWS)


@BOTH
def test_nan_stays_with_its_adapter(implementation: str) -> None:
    case = case_of(SEGMENTS["ranks 1 to 64"])
    dout = np.ones_like(case.y)
    clean = gradients(case.x, case.A, case.B, case.y, case.plan, dout, implementation)
    case.x[41] = np.nan  # of pages 8 to 11
    got = gradients(case.x, case.A, case.B, case.y, case.plan, dout, implementation)
    for one, other in zip(got[1:3], clean[1:3], strict=True):
        np.testing.assert_array_equal(np.delete(one, (8, 9, 10, 11), axis=0), np.delete(other, (8, 9, 10, 11), axis=0))
    assert np.isnan(got[1][8]).any()
    rows = np.delete(np.arange(ROWS), np.s_[40:56])
    np.testing.assert_array_equal(np.asarray(got[0])[rows], np.asarray(clean[0])[rows])
