"""The delta in a launch of its own: the numbers of `smlm`, and y untouched where a row has no adapter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.smlm import SmlmPlan, add_delta, delta_beside, plan_shapes, smlm_delta
from pallas_kernels.smlm.delta_triton import DeltaConfig, smlm_delta_triton
from tests.kernels.smlm_cases import MIXED, MIXED_ROWS, Case, brute_force, make_case
from tests.kernels.test_smlm_triton import pretend_gpu
from tests.tolerances import assert_close

CONFIGS = [
    DeltaConfig(parts=16, block_k=64, block_n=64),
    DeltaConfig(parts=1, block_k=256, block_n=16),
    DeltaConfig(parts=2, block_k=128, block_n=128),
]


def added(case: Case, delta: jax.Array) -> jax.Array:
    return add_delta(jnp.asarray(case.y), delta, case.plan)


def triton(case: Case, config: DeltaConfig | None = None) -> jax.Array:
    args = (jnp.asarray(case.x), jnp.asarray(case.A), jnp.asarray(case.B), SmlmPlan(*map(jnp.asarray, case.plan)))
    return smlm_delta_triton(*args, case.out_features, config=config)


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_every_configuration_is_the_formula(config: DeltaConfig) -> None:
    # 6 pages; 1040 is no multiple of spans or blocks, and blocks of outputs straddle no target.
    case = make_case([*MIXED, (113, 5, (8, 7, 6, 5, 4, 3))], MIXED_ROWS, 1040, (80, 16, 16), max_pages=6)
    assert_close(added(case, triton(case, config)), case.y + brute_force(case), "f32")


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_one_page_an_adapter(implementation: str) -> None:
    case = make_case([(0, 3, (1,)), (3, 1, ()), (4, 20, (2,)), (31, 1, (3,))], 32, 64, (48,), max_pages=1)
    delta = smlm_delta(
        *map(jnp.asarray, (case.x, case.A, case.B)),
        case.plan,
        out_features=case.out_features,
        implementation=implementation,
    )
    assert_close(added(case, delta), case.y + brute_force(case), "f32")


def test_a_step_without_adapters_leaves_y_alone() -> None:
    case = make_case([], 16, 64, (48,), max_pages=1)
    np.testing.assert_array_equal(added(case, triton(case)), case.y)


def test_rows_without_adapter_never_see_the_delta() -> None:
    """Their delta is undefined: here it is NaN."""
    case = make_case(MIXED, MIXED_ROWS, 64, (48,))
    has = np.zeros(MIXED_ROWS, bool)
    for first, rows, pages in MIXED:
        has[first : first + rows] = bool(pages)
    delta = np.where(has[:, None], np.asarray(triton(case)), np.nan)
    got = np.asarray(added(case, jnp.asarray(delta)))
    np.testing.assert_array_equal(got[~has], case.y[~has])
    assert np.isfinite(got).all()


def test_nan_in_a_page_stays_with_its_rows() -> None:
    case = make_case(MIXED, MIXED_ROWS, 64, (48, 16))
    clean = np.asarray(added(case, triton(case)))
    case.A[5], case.B[5] = np.nan, np.inf
    got = np.asarray(added(case, triton(case)))
    sick = np.arange(80, 96)  # the rows of the segment that holds page 5
    np.testing.assert_array_equal(np.delete(got, sick, axis=0), np.delete(clean, sick, axis=0))
    assert np.isnan(got[sick]).all()


def test_only_kernels_run_beside_the_gemm() -> None:
    assert delta_beside("triton")
    assert not delta_beside("xla")


def test_shapes_are_checked() -> None:
    case = make_case([(0, 2, (1,))], 4, 64, (48,))
    with pytest.raises(ValueError, match="48"):
        smlm_delta(case.x, case.A, case.B[:, :, :32], case.plan, out_features=(48,), implementation="xla")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize(
    ("size", "out_features", "max_pages"),
    [(4096, (4096, 1024, 1024), 1), (14336, (4096,), 4), (896, (4864, 4864), 6)],
    ids=["qkv", "down_r64", "gate_up_r96"],
)
def test_lowers_for_cuda(size: int, out_features: tuple[int, ...], max_pages: int, dtype: jnp.dtype) -> None:
    out, targets = sum(out_features), len(out_features)
    shapes = [(32, size), (65, targets * 16, size), (65, 16, out)]
    x, A, B = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)

    def f(x: jax.Array, A: jax.Array, B: jax.Array, plan: SmlmPlan) -> jax.Array:
        return smlm_delta_triton(x, A, B, plan, out_features, interpret=False)

    with pretend_gpu():
        traced = jax.jit(f).trace(x, A, B, plan_shapes(32, 32, max_pages))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 2
