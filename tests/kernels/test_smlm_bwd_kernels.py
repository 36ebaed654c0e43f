"""The Triton backward of packs: blocks that fit, CUDA for two shapes of each, and what only a GPU can show."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import smlm_bwd
from pallas_kernels.smlm import pack_plan
from pallas_kernels.smlm.pack_glu import pack_glu_triton
from pallas_kernels.smlm.pack_triton import pack_dy_triton, pack_x_triton
from pallas_kernels.smlm.pack_tuning import MAX_SHARED_BYTES, Block, GluConfig, default_dy_config, default_x_config
from tests.kernels.glu_cases import GLU_CASES, glu_arrays, gradients_glu, reference_glu
from tests.kernels.pack_cases import Case, ids_of, pool_of, reference, shrink
from tests.kernels.quick import quick_jit
from tests.tolerances import assert_close

KERNEL = "stablehlo.custom_call @__gpu$xla.gpu.triton"

SHAPES = {
    "r16": Case(1, 1024, 4096, (4096,), 1),
    "wide_r64": Case(1, 1024, 4096, (14336,), 4),
    "packs": Case(4, 1024, 4096, (14336,), 1),
    "qkv_r128": Case(1, 512, 4096, (4096, 1024, 1024), 8),
    "gate_up": Case(4, 1024, 4096, (14336, 14336), 1),
    "down_r96": Case(2, 96, 14336, (4096,), 6),
    "odd": Case(3, 32, 896, (4864, 112), 2),
}


@pytest.mark.parametrize(
    ("name", "dtype"), [("qkv_r128", jnp.bfloat16), ("odd", jnp.float32)], ids=["bf16_qkv_r128", "f32_odd"]
)
def test_lowers_for_cuda(name: str, dtype: jnp.dtype, lower_for_cuda: Callable[..., str]) -> None:
    case = SHAPES[name]
    n, out = len(case.outs), sum(case.outs)
    shapes = [
        jax.ShapeDtypeStruct((case.packs, case.rows, case.size), dtype),
        jax.ShapeDtypeStruct((case.packs, case.pages, n * 16, case.size), jnp.float32),
        jax.ShapeDtypeStruct((case.packs, case.pages, 16, out), jnp.float32),
        jax.ShapeDtypeStruct((case.packs, case.rows, n, case.pages, 16), dtype),
        jax.ShapeDtypeStruct((case.packs, case.rows, out), dtype),
    ]

    def f(x: jax.Array, A: jax.Array, B: jax.Array, S: jax.Array, dy: jax.Array, dx: jax.Array) -> object:
        dS, dB = pack_dy_triton(B, S, dy, case.outs, interpret=False)
        return pack_x_triton(x, A, dS, dx, interpret=False), dB

    text = lower_for_cuda(f, *shapes, shapes[0], donate_argnums=5)
    assert text.count(KERNEL) == 2
    assert text.count("output_operand_aliases") == 1


@pytest.mark.parametrize("name", SHAPES)
def test_default_blocks_fit_the_device(name: str) -> None:
    case = SHAPES[name]
    ranks, stacked = case.pages * 16, len(case.outs) * case.pages * 16
    for dtype in (jnp.bfloat16, jnp.float32):
        config = default_dy_config(case.packs, case.rows, case.outs, case.pages, dtype)
        assert config.shared_bytes(ranks, dtype) <= MAX_SHARED_BYTES
        assert default_x_config(stacked, dtype).shared_bytes(stacked, dtype) <= MAX_SHARED_BYTES


@pytest.mark.parametrize("rank", [64, 256, 384, 512])
@pytest.mark.parametrize("targets", [1, 2, 3])
def test_default_blocks_fit_for_any_rank(targets: int, rank: int) -> None:
    for dtype in (jnp.bfloat16, jnp.float32):
        config = default_x_config(targets * rank, dtype)
        assert config.shared_bytes(targets * rank, dtype) <= MAX_SHARED_BYTES
        assert min(config.dX.rows, config.dX.columns) >= 4


GLU_SHAPES = {
    "8b": Case(1, 1024, 14336, (4096,), 1),
    "packs_r64": Case(4, 1024, 14336, (4096,), 4),
    "odd_r128": Case(2, 96, 4864, (896,), 8),
    "r256": Case(1, 64, 4096, (1024,), 16),
}


@pytest.mark.parametrize(
    ("name", "activation", "dtype"),
    [("8b", "silu", jnp.bfloat16), ("odd_r128", "gelu_pytorch_tanh", jnp.float32)],
    ids=["bf16_8b", "f32_odd_r128"],
)
def test_the_gated_activation_lowers_for_cuda(
    name: str, activation: str, dtype: jnp.dtype, lower_for_cuda: Callable[..., str]
) -> None:
    c = GLU_SHAPES[name]
    shapes = [
        jax.ShapeDtypeStruct((c.packs, c.rows, 2 * c.size), dtype),
        jax.ShapeDtypeStruct((c.packs, c.pages, 16, c.size), jnp.float32),
        jax.ShapeDtypeStruct((c.packs, c.rows, c.pages, 16), dtype),
        jax.ShapeDtypeStruct((c.packs, c.rows, c.size), dtype),
    ]
    assert lower_for_cuda(lambda *a: pack_glu_triton(*a, activation, interpret=False), *shapes).count(KERNEL) == 1


@pytest.mark.parametrize(("name", "parts"), [("pages", 2), ("all odd", 3)])
def test_programs_that_share_a_block_of_columns(name: str, parts: int) -> None:
    """Their sums of dA are one sum; every result is that of one program a block."""
    case = GLU_CASES[name]
    gate_up, A, _, W, dy = glu_arrays(case)
    dS = jnp.sin(jnp.arange(case.packs * case.rows * case.pages * 16, dtype=jnp.float32))
    dS, dact = dS.reshape(case.packs, case.rows, case.pages, 16), dy @ W.T
    configs = [GluConfig(Block(16, 32), n) for n in (1, parts)]
    runs = (quick_jit(lambda *a, config=config: pack_glu_triton(*a, "silu", config=config)) for config in configs)
    for one, other in zip(*(f(gate_up, A, dS, dact) for f in runs), strict=True):
        assert_close(one, other, "f32")


@pytest.mark.slow
def test_a_pack_keeps_its_bits_with_the_default_blocks() -> None:
    """In bfloat16, at a length where one pack and three are on two sides of a shape class of all rows."""
    rng, rows, outs = np.random.default_rng(0), 512, (8208,)

    def draw(*shape: int, dtype: jnp.dtype = jnp.bfloat16) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    gated = (draw(3, rows, 128), draw(3, 1, 16, 64, dtype=jnp.float32), draw(3, rows, 1, 16), draw(3, rows, 64))
    dy = (draw(3, 1, 16, 8208, dtype=jnp.float32), draw(3, rows, 1, 1, 16), draw(3, rows, 8208))
    for f, arrays in ((lambda *a: pack_glu_triton(*a, "silu"), gated), (lambda *a: pack_dy_triton(*a, outs), dy)):
        f = quick_jit(f)
        for alone, beside in zip(f(*(a[:1] for a in arrays)), f(*arrays), strict=True):
            np.testing.assert_array_equal(alone[0], beside[0])


def backward(
    case: Case, x: jax.Array, A: jax.Array, B: jax.Array, S: jax.Array, dy: jax.Array
) -> tuple[jax.Array, ...]:
    """dX + x, dA, dB, by kernels."""
    x, S, dy = (a.reshape(-1, *a.shape[2:]) for a in (x, S, dy))
    plan, options = pack_plan(ids_of(*A.shape[:2]), case.rows), {"dx": x, "implementation": "triton"}
    dX, dA, dB = smlm_bwd(S, x, pool_of(A), pool_of(B), plan, dy, out_features=case.outs, **options)
    return dX.reshape(case.packs, case.rows, -1), dA, dB


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("name", SHAPES)
def test_numerics_on_the_device(name: str, dtype: jnp.dtype) -> None:
    case = SHAPES[name]
    x, A, B, dy = case.arrays(dtype)
    got = jax.jit(lambda x, A, B, dy: backward(case, x, A, B, shrink(x, A), dy))(x, A, B, dy)
    dX, dA, dB = reference(case, x, A, B, dy)
    for one, other in zip(got, (x.astype(jnp.float32) + dX, dA, dB), strict=True):
        scale = float(jnp.abs(other).max())
        tolerance = "logits_f32" if dtype == jnp.float32 else "bf16_grad"
        assert_close(one.astype(jnp.float32) / scale, other / scale, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("name", GLU_SHAPES)
def test_numerics_through_a_gated_activation_on_the_device(name: str, dtype: jnp.dtype) -> None:
    arrays = glu_arrays(GLU_SHAPES[name], dtype)
    got, want = gradients_glu("silu", "triton", *arrays), reference_glu("silu", *arrays)
    for one, other in zip(got, want, strict=True):
        scale = float(jnp.abs(other).max())
        tolerance = "logits_f32" if dtype == jnp.float32 else "bf16_grad"
        assert_close(one.astype(jnp.float32) / scale, other / scale, tolerance)


@pytest.mark.gpu
def test_repeats_give_one_bit_pattern() -> None:
    case = Case(2, 512, 1024, (1024, 512), 2)
    x, A, B, dy = case.arrays(jnp.bfloat16)
    f = jax.jit(lambda x, A, B, dy: backward(case, x, A, B, shrink(x, A), dy))
    arrays = glu_arrays(Case(2, 512, 2048, (1024,), 2), jnp.bfloat16)
    runs = (lambda: f(x, A, B, dy)), (lambda: gradients_glu("silu", "triton", *arrays))
    for run in runs:
        want = run()
        for _ in range(50):
            for one, other in zip(run(), want, strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
def test_a_pack_keeps_its_bits_beside_nan(dtype: jnp.dtype) -> None:
    case = Case(3, 512, 1024, (1024, 512), 2)
    x, A, B, dy = case.arrays(dtype)
    S = shrink(x, A)
    f = jax.jit(lambda *a: backward(case, *a))
    clean = f(x, A, B, S, dy)
    for at in (0, 2):  # before it and after it
        dirty = f(*(a.at[at].set(jnp.nan) for a in (x, A, B, S, dy)))
        for one, other in zip(clean, dirty, strict=True):
            np.testing.assert_array_equal(np.delete(one, at, axis=0), np.delete(other, at, axis=0))
            assert np.isnan(np.asarray(other[at], np.float32)).all()
