"""The kernels of the forward: every configuration gives the same numbers, and two shapes of each lower for CUDA."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.smlm import TILE, WIDE, SmlmPlan, plan_shapes
from pallas_kernels.smlm import triton as launches
from pallas_kernels.smlm.delta import add_delta
from pallas_kernels.smlm.delta_triton import DeltaConfig, smlm_delta_triton
from pallas_kernels.smlm.triton import smlm_triton
from pallas_kernels.smlm.tuning import TUNED, SmlmConfig, num_spans, smlm_config
from pallas_kernels.smlm_glu.triton import smlm_glu_triton
from tests.kernels.quick import quick_jit
from tests.kernels.smlm_cases import CASES, Case, brute_force, rows_of_nobody
from tests.tolerances import assert_close

KERNEL = "stablehlo.custom_call @__gpu$xla.gpu.triton"
CONFIGS = [
    SmlmConfig(tile_rows=TILE, programs_k=16, block_k=64, block_n=64),
    SmlmConfig(tile_rows=TILE, programs_k=1, block_k=256, block_n=16),
    SmlmConfig(tile_rows=WIDE, programs_k=2, block_k=128, block_n=128),
    SmlmConfig(tile_rows=WIDE, reduce=True, programs_k=2, block_k=64, block_n=256, early=True),
    SmlmConfig(tile_rows=TILE, reduce=True, programs_k=1, block_k=32, block_n=32, branch=False),
    SmlmConfig(tile_rows=TILE, programs_k=4, block_k=64, block_n=64, group=2),
]


DELTA_CONFIGS = [
    DeltaConfig(parts=16, block_k=64, block_n=64),
    DeltaConfig(parts=1, block_k=256, block_n=16),
    DeltaConfig(parts=2, block_k=128, block_n=128),
]


def run(case: Case, config: SmlmConfig) -> jax.Array:
    def f(x: jax.Array, A: jax.Array, B: jax.Array, y: jax.Array, plan: SmlmPlan) -> jax.Array:
        return smlm_triton(x, A, B, plan, case.out_features, y, config=config)[0]

    return quick_jit(f)(case.x, case.A, case.B, case.y, case.plan)


@pytest.mark.parametrize(
    "config", [*(pytest.param(c, marks=pytest.mark.slow) for c in CONFIGS[:4]), *CONFIGS[4:]], ids=range(len(CONFIGS))
)
def test_every_configuration_is_the_formula(config: SmlmConfig) -> None:
    case = CASES["long"]()
    got = run(case, config)
    assert_close(got, case.y + brute_force(case), "f32")


@pytest.mark.parametrize("config", DELTA_CONFIGS, ids=range(len(DELTA_CONFIGS)))
def test_every_configuration_of_the_delta_is_the_formula(config: DeltaConfig) -> None:
    case = CASES["long"]()
    f = quick_jit(smlm_delta_triton, static_argnames=("out_features", "config"))
    delta = f(case.x, case.A, case.B, case.plan, case.out_features, config=config)
    assert_close(add_delta(case.y, delta, case.plan), case.y + brute_force(case), "f32")


def test_rows_without_adapter_never_see_the_delta() -> None:
    """Theirs is undefined: here it is NaN."""
    case = CASES["one target"]()
    nobody, delta = rows_of_nobody(case), np.ones_like(case.y)
    delta[nobody] = np.nan
    got = np.asarray(add_delta(jnp.asarray(case.y), jnp.asarray(delta), case.plan))
    np.testing.assert_array_equal(got[nobody], case.y[nobody])
    assert np.isfinite(got).all()


@pytest.mark.slow
def test_a_bounded_grid_walks_all_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["one target"]()
    config = SmlmConfig(block_n=16)
    want = run(case, config)
    monkeypatch.setattr(launches, "MAX_PROGRAMS", 3)
    smlm_triton.clear_cache()
    got = run(case, config)
    smlm_triton.clear_cache()
    np.testing.assert_array_equal(got, want)


def test_spans_grow_with_the_input_only() -> None:
    assert [num_spans(n) for n in (16, 1023, 1024, 4096, 14336, 65536)] == [1, 1, 2, 8, 16, 16]


@pytest.mark.parametrize("kind", ["NVIDIA H200", "NVIDIA A100-SXM4-40GB"])
def test_every_shape_class_has_a_configuration_that_fits(kind: str) -> None:
    limit = 227 * 1024 if kind in TUNED else 99 * 1024
    for rows in (1, 512, 513, 8192):
        for size, out in ((4096, (4096,)), (4096, (4096, 1024, 1024)), (4096, (14336, 14336)), (14336, (4096,))):
            for pages in (1, 4, 8):
                config = smlm_config(rows, size, out, pages, jnp.bfloat16, kind)
                ranks, spans = len(out) * min(pages, config.group) * 16, num_spans(size) // config.programs_k
                used = 2 * (config.tile_rows + ranks) * config.block_k * spans * config.shrink_stages
                assert used <= limit
                assert config.early == (kind in TUNED)


SHAPES = pytest.mark.parametrize(
    ("dtype", "rows", "size", "out_features", "max_pages"),
    [(jnp.bfloat16, 32, 4096, (4096, 1024, 1024), 1), (jnp.float32, 2048, 896, (4864, 4864), 6)],
    ids=["bf16_decode_qkv", "f32_mixed_gate_up_r96"],
)


def shapes(dtype: jnp.dtype, rows: int, size: int, out_features: tuple[int, ...]) -> list[jax.ShapeDtypeStruct]:
    """x, A, B, y."""
    out, targets = sum(out_features), len(out_features)
    wanted = [(rows, size), (65, targets * 16, size), (65, 16, out), (rows, out)]
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in wanted]


@SHAPES
def test_lowers_for_cuda(
    dtype: jnp.dtype, rows: int, size: int, out_features: tuple[int, ...], max_pages: int,
    lower_for_cuda: Callable[..., str],
) -> None:  # fmt: skip
    *operands, y = shapes(dtype, rows, size, out_features)

    def f(x: jax.Array, A: jax.Array, B: jax.Array, plan: SmlmPlan, y: jax.Array) -> object:
        return smlm_triton(x, A, B, plan, out_features, y, interpret=False)

    text = lower_for_cuda(f, *operands, plan_shapes(rows, 32 + rows // 16, max_pages), y, donate_argnums=4)
    assert text.count(KERNEL) == 2
    assert text.count("output_operand_aliases") == 1


@SHAPES
def test_the_delta_lowers_for_cuda(
    dtype: jnp.dtype, rows: int, size: int, out_features: tuple[int, ...], max_pages: int,
    lower_for_cuda: Callable[..., str],
) -> None:  # fmt: skip
    *operands, _ = shapes(dtype, rows, size, out_features)

    def f(x: jax.Array, A: jax.Array, B: jax.Array, plan: SmlmPlan) -> jax.Array:
        return smlm_delta_triton(x, A, B, plan, out_features, interpret=False)

    assert lower_for_cuda(f, *operands, plan_shapes(rows, 32, max_pages)).count(KERNEL) == 2


@pytest.mark.parametrize(
    ("name", "dtype"), [("silu", jnp.bfloat16), ("gelu_pytorch_tanh", jnp.float32)], ids=["bf16_silu", "f32_gelu"]
)
def test_the_gated_activation_lowers_for_cuda(
    name: str, dtype: jnp.dtype, lower_for_cuda: Callable[..., str]
) -> None:
    *operands, y = shapes(dtype, 1568, 4096, (14336, 14336))

    def f(x: jax.Array, A: jax.Array, B: jax.Array, plan: SmlmPlan, y: jax.Array) -> object:
        return smlm_glu_triton(x, A, B, plan, y, name, 1024, interpret=False)

    text = lower_for_cuda(f, *operands, plan_shapes(1568, 130, 4, 62), y)
    assert text.count(KERNEL) == 2
    assert text.count("output_operand_aliases") == 1  # the counters


def test_early_release_is_in_the_kernels_that_ask_for_it(lower_for_cuda: Callable[..., str]) -> None:
    x, A, B = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((32, 64), (9, 16, 64), (9, 16, 48)))

    def text(early: bool) -> str:
        def f(x: jax.Array, A: jax.Array, B: jax.Array, plan: object) -> jax.Array:
            return smlm_triton(x, A, B, plan, (48,), None, interpret=False, config=SmlmConfig(early=early))[0]

        return lower_for_cuda(f, x, A, B, plan_shapes(32, 32, 1))

    assert text(True).count("griddepcontrol.launch_dependents") == 2
    assert "griddepcontrol" not in text(False)
