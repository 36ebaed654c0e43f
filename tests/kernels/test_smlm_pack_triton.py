"""The Triton backward of packs: blocks that fit, CUDA for two shape classes, and what only a GPU can show."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.smlm.pack_triton import backward_dy, backward_x, pack_backward_triton
from pallas_kernels.smlm.pack_tuning import MAX_SHARED_BYTES, default_dy_config, default_x_config
from tests.kernels.pack_cases import Case, reference, shrink
from tests.tolerances import assert_close

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
        dS, dB = backward_dy(B, S, dy, case.outs, interpret=False)
        return backward_x(x, A, dS, dx, interpret=False), dB

    text = lower_for_cuda(f, *shapes, shapes[0], donate_argnums=5)
    assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 2
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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("name", SHAPES)
def test_numerics_on_the_device(name: str, dtype: jnp.dtype) -> None:
    case = SHAPES[name]
    x, A, B, dy = case.arrays(dtype)
    got = jax.jit(lambda x, A, B, dy: pack_backward_triton(x, A, B, shrink(x, A), dy, case.outs, x))(x, A, B, dy)
    dX, dA, dB = reference(case, x, A, B, dy)
    for one, other in zip(got, (x.astype(jnp.float32) + dX, dA, dB), strict=True):
        scale = float(jnp.abs(other).max())
        tolerance = "logits_f32" if dtype == jnp.float32 else "bf16_grad"
        assert_close(one.astype(jnp.float32) / scale, other / scale, tolerance)


@pytest.mark.gpu
def test_repeats_give_one_bit_pattern() -> None:
    case = Case(2, 512, 1024, (1024, 512), 2)
    x, A, B, dy = case.arrays(jnp.bfloat16)
    f = jax.jit(lambda x, A, B, dy: pack_backward_triton(x, A, B, shrink(x, A), dy, case.outs))
    want = f(x, A, B, dy)
    for _ in range(50):
        for one, other in zip(f(x, A, B, dy), want, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
def test_a_pack_keeps_its_bits_beside_nan(dtype: jnp.dtype) -> None:
    case = Case(3, 512, 1024, (1024, 512), 2)
    x, A, B, dy = case.arrays(dtype)
    S = shrink(x, A)
    f = jax.jit(lambda *a: pack_backward_triton(*a, case.outs))
    clean = f(x, A, B, S, dy)
    for at in (0, 2):  # before it and after it
        dirty = f(*(a.at[at].set(jnp.nan) for a in (x, A, B, S, dy)))
        for one, other in zip(clean, dirty, strict=True):
            np.testing.assert_array_equal(np.delete(one, at, axis=0), np.delete(other, at, axis=0))
            assert np.isnan(np.asarray(other[at], np.float32)).all()
