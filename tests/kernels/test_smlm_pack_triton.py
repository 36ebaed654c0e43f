"""The Triton backward of packs: gradients of the plain formula, packs that never mix, CUDA for every shape class."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels.smlm import pack_lora, pack_shrink
from pallas_kernels.smlm.pack import pack_backward_xla
from pallas_kernels.smlm.pack_triton import backward_dy, backward_x, pack_backward_triton
from pallas_kernels.smlm.pack_tuning import (
    MAX_SHARED_BYTES,
    Block,
    DyConfig,
    XConfig,
    default_dy_config,
    default_x_config,
)
from tests.tolerances import assert_close

SMALL = {
    "dy_config": DyConfig(Block(16, 32), Block(32, 32, 64), turns=2),
    "x_config": XConfig(Block(16, 32), Block(32, 16, 32)),
}


@dataclass(frozen=True)
class Case:
    packs: int
    rows: int
    size: int
    outs: tuple[int, ...]
    pages: int

    def arrays(self, dtype: jnp.dtype = jnp.float32, seed: int = 0) -> list[jax.Array]:
        """x, A, B, dy; A and B in float32 with values of `dtype`."""
        rng, n = np.random.default_rng(seed), len(self.outs)
        x = rng.normal(size=(self.packs, self.rows, self.size))
        A = rng.normal(size=(self.packs, self.pages, n * 16, self.size)) * self.size**-0.5
        B = rng.normal(size=(self.packs, self.pages, 16, sum(self.outs))) * 0.25
        dy = rng.normal(size=(self.packs, self.rows, sum(self.outs)))
        x, A, B, dy = (jnp.asarray(a, dtype) for a in (x, A, B, dy))
        return [x, A.astype(jnp.float32), B.astype(jnp.float32), dy]


CASES = {
    "one pack": Case(1, 64, 128, (64,), 1),
    "pages": Case(2, 96, 64, (64,), 3),
    "targets": Case(2, 64, 96, (48, 16, 16), 1),
    "all odd": Case(3, 40, 80, (112, 80), 3),
    "rank 128": Case(1, 32, 64, (32, 32), 8),
    "one row packs": Case(3, 1, 48, (16, 32), 2),
}


def plain(x: jax.Array, A: jax.Array, B: jax.Array, outs: tuple[int, ...]) -> jax.Array:
    """Per target, in full: no stacking, no fused columns."""
    deltas, start = [], 0
    for i, size in enumerate(outs):
        A_i, B_i = A[:, :, i * 16 : (i + 1) * 16], B[..., start : start + size]
        W = jnp.einsum("gmri,gmro->gio", A_i, B_i, precision="highest")
        deltas.append(jnp.einsum("gli,gio->glo", x, W, precision="highest"))
        start += size
    return jnp.concatenate(deltas, axis=-1)


def reference(case: Case, x: jax.Array, A: jax.Array, B: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
    """dX, dA, dB of the plain formula, in float32."""
    wide = [a.astype(jnp.float32) for a in (x, A, B, dy)]
    return jax.jit(lambda x, A, B, dy: jax.vjp(lambda *a: plain(*a, case.outs), x, A, B)[1](dy))(*wide)


def gradients(
    case: Case, x: jax.Array, A: jax.Array, B: jax.Array, dy: jax.Array, **config: object
) -> tuple[jax.Array, ...]:
    """dX, dA, dB of the kernels."""
    return pack_backward_triton(x, A, B, pack_shrink(x, A), dy, case.outs, **(config or SMALL))


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_formula(name: str) -> None:
    case = CASES[name]
    x, A, B, dy = case.arrays()
    got = gradients(case, x, A, B, dy)
    for one, other, like in zip(got, reference(case, x, A, B, dy), (x, A, B), strict=True):
        assert one.dtype == like.dtype
        assert_close(one, other, "logits_f32")


@pytest.mark.parametrize("name", ["pages", "all odd"])
def test_bfloat16_rows_give_float32_gradients_of_float32_pages(name: str) -> None:
    case = CASES[name]
    x, A, B, dy = case.arrays(jnp.bfloat16)
    got = gradients(case, x, A, B, dy)
    assert [a.dtype for a in got] == [jnp.bfloat16, jnp.float32, jnp.float32]
    for one, other in zip(got, reference(case, x, A, B, dy), strict=True):
        scale = float(jnp.abs(other).max())
        assert_close(one.astype(jnp.float32) / scale, other / scale, "bf16_grad")


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("name", ["targets", "one row packs"])
def test_dx_is_added_to_what_is_given(name: str, implementation: str) -> None:
    case = CASES[name]
    x, A, B, dy = case.arrays()
    given, function = jnp.sin(x), {"xla": pack_backward_xla, "triton": pack_backward_triton}[implementation]
    want = function(x, A, B, pack_shrink(x, A), dy, case.outs)
    got = function(x, A, B, pack_shrink(x, A), dy, case.outs, given)
    assert_close(got[0], given + want[0], "f32")
    for one, other in zip(got[1:], want[1:], strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_sum_with_a_given_dx_is_rounded_once() -> None:
    case = CASES["one pack"]
    x, A, B, dy = case.arrays(jnp.bfloat16)
    S, given = pack_shrink(x, A), (8 * x).astype(jnp.bfloat16)
    got = pack_backward_triton(x, A, B, S, dy, case.outs, given, **SMALL)[0]
    wide = pack_backward_triton(*(a.astype(jnp.float32) for a in (x, A, B, S, dy)), case.outs, **SMALL)[0]
    want = given.astype(jnp.float32) + wide
    assert float(jnp.abs(got.astype(jnp.float32) - want).max() / jnp.abs(want).max()) < 2**-8


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
def test_implementations_agree_through_the_op(dtype: jnp.dtype) -> None:
    case = CASES["targets"]
    x, A, B, dy = case.arrays(dtype)

    def run(implementation: str) -> list[jax.Array]:
        f = jax.jit(lambda *a: pack_lora(*a, case.outs, implementation=implementation))
        value, transpose = jax.vjp(f, x, A, B)
        return [value, *transpose(dy)]

    for one, other in zip(run("triton"), run("xla"), strict=True):
        assert one.dtype == other.dtype
        assert_close(one.astype(jnp.float32), other.astype(jnp.float32), "f32" if dtype == jnp.float32 else "bf16")


def test_a_pack_keeps_its_bits_beside_any_other() -> None:
    case = CASES["all odd"]
    x, A, B, dy = case.arrays()
    alone = gradients(case, x[1:2], A[1:2], B[1:2], dy[1:2])
    for bad in (x.at[0].set(jnp.nan), x.at[2, -1].set(jnp.inf)):
        beside = gradients(case, bad, A.at[2].set(jnp.inf), B.at[0].set(jnp.nan), dy)
        for one, other in zip(alone, beside, strict=True):
            np.testing.assert_array_equal(one[0], other[1])


def test_absent_pages_add_nothing() -> None:
    case = CASES["one pack"]
    x, A, B, dy = case.arrays()
    padded = [jnp.concatenate([a, jnp.zeros_like(a)], axis=1) for a in (A, B)]
    dx, dA, dB = gradients(case, x, A, B, dy)
    got = gradients(case, x, *padded, dy)
    assert_close(got[0], dx, "f32")
    for one, other in zip(got[1:], (dA, dB), strict=True):
        assert_close(one[:, :1], other, "f32")
        np.testing.assert_array_equal(one[:, 1:], 0)


def test_an_unknown_implementation_is_refused() -> None:
    case = CASES["one pack"]
    x, A, B, _ = case.arrays()
    with pytest.raises(ValueError, match="implementation: got 'cuda', expected"):
        pack_lora(x, A, B, case.outs, implementation="cuda")


@contextlib.contextmanager
def pretend_gpu() -> Iterator[None]:
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield


SHAPES = {
    "r16": Case(1, 1024, 4096, (4096,), 1),
    "wide_r64": Case(1, 1024, 4096, (14336,), 4),
    "packs": Case(4, 1024, 4096, (14336,), 1),
    "qkv_r128": Case(1, 512, 4096, (4096, 1024, 1024), 8),
    "gate_up": Case(4, 1024, 4096, (14336, 14336), 1),
    "down_r96": Case(2, 96, 14336, (4096,), 6),
    "odd": Case(3, 32, 896, (4864, 112), 2),
}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("name", SHAPES)
def test_lowers_for_cuda(name: str, dtype: jnp.dtype) -> None:
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

    with pretend_gpu():
        traced = jax.jit(f, donate_argnums=5).trace(*shapes, shapes[0])
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
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
    with jax.default_matmul_precision("highest"):
        S = pack_shrink(x, A)
        got = jax.jit(lambda *a: pack_backward_triton(*a, case.outs, x))(x, A, B, S, dy)
    dX, dA, dB = reference(case, x, A, B, dy)
    for one, other in zip(got, (x.astype(jnp.float32) + dX, dA, dB), strict=True):
        scale = float(jnp.abs(other).max())
        tolerance = "logits_f32" if dtype == jnp.float32 else "bf16_grad"
        assert_close(one.astype(jnp.float32) / scale, other / scale, tolerance)


@pytest.mark.gpu
def test_repeats_give_one_bit_pattern() -> None:
    case = Case(2, 512, 1024, (1024, 512), 2)
    x, A, B, dy = case.arrays(jnp.bfloat16)
    f = jax.jit(lambda *a: gradients(case, *a, x_config=None))
    want = f(x, A, B, dy)
    for _ in range(50):
        for one, other in zip(f(x, A, B, dy), want, strict=True):
            np.testing.assert_array_equal(one, other)
