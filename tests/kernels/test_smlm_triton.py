"""The Triton kernels: every configuration gives the same numbers, and two shape classes lower for CUDA."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.smlm import TILE, WIDE, SmlmPlan, plan_shapes
from pallas_kernels.smlm import triton as launches
from pallas_kernels.smlm.triton import smlm_triton
from pallas_kernels.smlm.tuning import TUNED, SmlmConfig, default_config, num_spans
from tests.kernels.quick import quick_jit
from tests.kernels.smlm_cases import CASES, Case, brute_force
from tests.tolerances import assert_close

CONFIGS = [
    SmlmConfig(tile_rows=TILE, programs_k=16, block_k=64, block_n=64),
    SmlmConfig(tile_rows=TILE, programs_k=1, block_k=256, block_n=16),
    SmlmConfig(tile_rows=WIDE, programs_k=2, block_k=128, block_n=128),
    SmlmConfig(tile_rows=WIDE, reduce=True, programs_k=2, block_k=64, block_n=256, early=True),
    SmlmConfig(tile_rows=TILE, reduce=True, programs_k=1, block_k=32, block_n=32, branch=False),
    SmlmConfig(tile_rows=TILE, programs_k=4, block_k=64, block_n=64, group=2),
]


def run(case: Case, config: SmlmConfig) -> jax.Array:
    def f(*args: jax.Array) -> jax.Array:
        x, A, B, y, *plan = args
        return smlm_triton(x, A, B, SmlmPlan(*plan), case.out_features, y, config=config)

    return quick_jit(f)(case.x, case.A, case.B, case.y, *case.plan)


@pytest.mark.parametrize(
    "config", [*(pytest.param(c, marks=pytest.mark.slow) for c in CONFIGS[:2]), *CONFIGS[2:]], ids=range(len(CONFIGS))
)
def test_every_configuration_is_the_formula(config: SmlmConfig) -> None:
    case = CASES["long"]()
    got = run(case, config)
    assert_close(got, case.y + brute_force(case), "f32")


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
                config = default_config(rows, size, out, pages, jnp.bfloat16, kind)
                ranks, spans = len(out) * min(pages, config.group) * 16, num_spans(size) // config.programs_k
                used = 2 * (config.tile_rows + ranks) * config.block_k * spans * config.shrink_stages
                assert used <= limit
                assert config.early == (kind in TUNED)


@pytest.mark.parametrize(
    ("dtype", "rows", "size", "out_features", "max_pages"),
    [(jnp.bfloat16, 32, 4096, (4096, 1024, 1024), 1), (jnp.float32, 2048, 896, (4864, 4864), 6)],
    ids=["bf16_decode_qkv", "f32_mixed_gate_up_r96"],
)
def test_lowers_for_cuda(
    dtype: jnp.dtype,
    rows: int,
    size: int,
    out_features: tuple[int, ...],
    max_pages: int,
    lower_for_cuda: Callable[..., str],
) -> None:
    out, targets = sum(out_features), len(out_features)
    shapes = [(rows, size), (65, targets * 16, size), (65, 16, out), (rows, out)]
    x, A, B, y = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)

    def f(x: jax.Array, A: jax.Array, B: jax.Array, plan: object, y: jax.Array) -> jax.Array:
        return smlm_triton(x, A, B, plan, out_features, y, interpret=False)

    text = lower_for_cuda(f, x, A, B, plan_shapes(rows, 32 + rows // 16, max_pages), y, donate_argnums=4)
    assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 2
    assert "output_operand_aliases" in text


def test_early_release_is_in_the_kernels_that_ask_for_it(lower_for_cuda: Callable[..., str]) -> None:
    x, A, B = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((32, 64), (9, 16, 64), (9, 16, 48)))

    def text(early: bool) -> str:
        def f(x: jax.Array, A: jax.Array, B: jax.Array, plan: object) -> jax.Array:
            return smlm_triton(x, A, B, plan, (48,), None, interpret=False, config=SmlmConfig(early=early))

        return lower_for_cuda(f, x, A, B, plan_shapes(32, 32, 1))

    assert text(True).count("griddepcontrol.launch_dependents") == 2
    assert "griddepcontrol" not in text(False)
