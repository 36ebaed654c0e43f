"""The delta in a launch of its own: the numbers of `smlm`, and y untouched where a row has no adapter."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.smlm import SmlmPlan, add_delta, delta_beside, plan_shapes, smlm_delta
from pallas_kernels.smlm.delta_triton import DeltaConfig, smlm_delta_triton
from tests.kernels.quick import quick_jit
from tests.kernels.smlm_cases import CASES, Case, brute_force, make_case, rows_of_nobody
from tests.tolerances import assert_close

CONFIGS = [
    DeltaConfig(parts=16, block_k=64, block_n=64),
    DeltaConfig(parts=1, block_k=256, block_n=16),
    DeltaConfig(parts=2, block_k=128, block_n=128),
]


run = quick_jit(smlm_delta_triton, static_argnames=("out_features", "config"))


def added(case: Case, delta: jax.Array) -> jax.Array:
    return add_delta(jnp.asarray(case.y), delta, case.plan)


def triton(case: Case, config: DeltaConfig | None = None) -> jax.Array:
    return run(case.x, case.A, case.B, case.plan, case.out_features, config=config)


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_every_configuration_is_the_formula(config: DeltaConfig) -> None:
    case = CASES["long"]()
    assert_close(added(case, triton(case, config)), case.y + brute_force(case), "f32")


def test_rows_without_adapter_never_see_the_delta() -> None:
    """Their delta is undefined: here it is NaN."""
    case = CASES["one target"]()
    nobody, delta = rows_of_nobody(case), np.array(triton(case))
    delta[nobody] = np.nan
    got = np.asarray(added(case, jnp.asarray(delta)))
    np.testing.assert_array_equal(got[nobody], case.y[nobody])
    assert np.isfinite(got).all()


def test_nan_in_a_page_stays_with_its_rows() -> None:
    case = CASES["one target"]()
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


@pytest.mark.parametrize(
    ("dtype", "size", "out_features", "max_pages"),
    [(jnp.bfloat16, 4096, (4096, 1024, 1024), 1), (jnp.float32, 896, (4864, 4864), 6)],
    ids=["bf16_qkv", "f32_gate_up_r96"],
)
def test_lowers_for_cuda(
    size: int, out_features: tuple[int, ...], max_pages: int, dtype: jnp.dtype, lower_for_cuda: Callable[..., str]
) -> None:
    out, targets = sum(out_features), len(out_features)
    shapes = [(32, size), (65, targets * 16, size), (65, 16, out)]
    x, A, B = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)

    def f(x: jax.Array, A: jax.Array, B: jax.Array, plan: SmlmPlan) -> jax.Array:
        return smlm_delta_triton(x, A, B, plan, out_features, interpret=False)

    text = lower_for_cuda(f, x, A, B, plan_shapes(32, 32, max_pages))
    assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 2
