"""The backward of a gated MLP's second half against autodiff of the plain formula; CUDA for two shapes."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loquetier_jax.models.decoder import ACTIVATIONS
from pallas_kernels.smlm import pack_backward_dy, pack_glu_backward
from pallas_kernels.smlm.pack_tuning import Block, GluConfig
from tests.kernels.pack_cases import shrink
from tests.kernels.quick import quick_jit
from tests.tolerances import assert_close

F32 = jnp.float32
SMALL = GluConfig(Block(16, 32))
"""Several blocks even of small packs; a GPU takes the blocks that it takes in earnest."""


@dataclass(frozen=True)
class Case:
    packs: int
    rows: int
    size: int  # F
    out: int
    pages: int = 1

    def arrays(self, dtype: jnp.dtype = F32) -> list[jax.Array]:
        """gate_up, A, B, W, dy; A and B in float32 with values of `dtype`."""
        rng = np.random.default_rng(0)

        def draw(*shape: int, scale: float = 1.0) -> jax.Array:
            return jnp.asarray(rng.normal(size=shape) * scale, dtype)

        A = draw(self.packs, self.pages, 16, self.size, scale=self.size**-0.5)
        B = draw(self.packs, self.pages, 16, self.out, scale=0.25)
        W = draw(self.size, self.out, scale=self.size**-0.5)
        gate_up, dy = (draw(self.packs, self.rows, n) for n in (2 * self.size, self.out))
        return [gate_up, A.astype(F32), B.astype(F32), W, dy]


CASES = {
    "one pack": Case(1, 64, 64, 48),
    "one row packs": Case(3, 1, 32, 32),
    "pages": Case(2, 32, 96, 64, 3),
    "all odd": Case(2, 40, 80, 112, 4),
    "rank 144": Case(1, 16, 32, 16, 9),
}


def down(
    act: str, gate_up: jax.Array, A: jax.Array, B: jax.Array, W: jax.Array
) -> jax.Array:
    """The projection of act(gate) * up with its adapter, in full."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    full = W[None] + jnp.einsum("gmrf,gmrd->gfd", A, B, precision="highest")
    return jnp.einsum("glf,gfd->gld", ACTIVATIONS[act](gate) * up, full, precision="highest")


@functools.partial(quick_jit, static_argnums=0)
def reference(act: str, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Gradients of gate_up, A and B, in float32."""
    gate_up, A, B, W, dy = (a.astype(F32) for a in arrays)
    return jax.vjp(lambda *a: down(act, *a, W), gate_up, A, B)[1](dy)


@functools.partial(quick_jit, static_argnums=0, static_argnames="config")
def gradients(
    act: str,
    gate_up: jax.Array,
    A: jax.Array,
    B: jax.Array,
    W: jax.Array,
    dy: jax.Array,
    config: GluConfig | None = SMALL,
) -> tuple[jax.Array, ...]:
    """Those of the kernels."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    S = shrink(ACTIVATIONS[act](gate.astype(F32)).astype(gate.dtype) * up, A)
    dact = jnp.einsum("gld,fd->glf", dy.astype(F32), W.astype(F32), precision="highest").astype(dy.dtype)
    dS, dB = pack_backward_dy(B, S, dy, (dy.shape[2],), implementation="triton")
    return *pack_glu_backward(gate_up, A, dS, dact, act, config=config), dB


@pytest.mark.also_gpu
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_formula(name: str) -> None:
    arrays = CASES[name].arrays()
    config = SMALL if jax.default_backend() == "cpu" else None
    got, want = gradients("silu", *arrays, config=config), reference("silu", *arrays)
    for one, other, like in zip(got, want, arrays, strict=False):
        assert (one.shape, one.dtype) == (like.shape, like.dtype)
        assert_close(one, other, "logits_f32")


@pytest.mark.parametrize(("name", "parts"), [("pages", 2), ("all odd", 3)])
def test_programs_that_share_a_block_of_columns(name: str, parts: int) -> None:
    arrays = CASES[name].arrays()
    got = gradients("silu", *arrays, config=GluConfig(Block(16, 32), parts))
    for one, other in zip(got, reference("silu", *arrays), strict=True):
        assert_close(one, other, "logits_f32")


@pytest.mark.parametrize("name", [pytest.param("relu", marks=pytest.mark.slow), "gelu_pytorch_tanh"])
def test_other_activations(name: str) -> None:
    arrays = CASES["one pack"].arrays()
    for one, other in zip(
        gradients(name, *arrays), reference(name, *arrays), strict=True
    ):
        assert_close(one, other, "logits_f32")


@pytest.mark.parametrize("name", ["all odd", pytest.param("pages", marks=pytest.mark.slow)])
def test_bfloat16_rows_give_float32_gradients_of_float32_pages(name: str) -> None:
    arrays = CASES[name].arrays(jnp.bfloat16)
    got, want = gradients("silu", *arrays), reference("silu", *arrays)
    assert [a.dtype for a in got] == [jnp.bfloat16, F32, F32]
    for one, other in zip(got, want, strict=True):
        scale = float(jnp.abs(other).max())
        assert_close(one.astype(F32) / scale, other / scale, "bf16_grad")


def test_a_pack_keeps_its_bits_beside_any_other() -> None:
    gate_up, A, B, W, dy = CASES["all odd"].arrays()
    alone = gradients("silu", gate_up[1:], A[1:], B[1:], W, dy[1:])
    beside = gradients("silu", gate_up.at[0].set(jnp.nan), A.at[0].set(jnp.inf), B, W, dy)
    for one, other in zip(alone, beside, strict=True):
        np.testing.assert_array_equal(one[0], other[1])


def test_absent_pages_get_nothing() -> None:
    gate_up, A, B, W, dy = CASES["pages"].arrays()
    absent = [a.at[:, 1:].set(0).at[1].set(0) for a in (A, B)]  # pack 1 has no adapter
    got = gradients("silu", gate_up, *absent, W, dy)
    want = reference("silu", gate_up, *absent, W, dy)
    for one, other in zip(got, want, strict=True):
        assert_close(one, other, "logits_f32")
    for d in got[1:]:
        np.testing.assert_array_equal(d[:, 1:], 0)
        np.testing.assert_array_equal(d[1], 0)


SHAPES = {
    "8b": Case(1, 1024, 14336, 4096),
    "packs_r64": Case(4, 1024, 14336, 4096, 4),
    "odd_r128": Case(2, 96, 4864, 896, 8),
    "r256": Case(1, 64, 4096, 1024, 16),
}


@pytest.mark.parametrize(
    ("name", "activation", "dtype"),
    [("8b", "silu", jnp.bfloat16), ("odd_r128", "gelu_pytorch_tanh", jnp.float32)],
    ids=["bf16_8b", "f32_odd_r128"],
)
def test_lowers_for_cuda(
    name: str, activation: str, dtype: jnp.dtype, lower_for_cuda: Callable[..., str]
) -> None:
    c = SHAPES[name]
    shapes = [
        jax.ShapeDtypeStruct((c.packs, c.rows, 2 * c.size), dtype),
        jax.ShapeDtypeStruct((c.packs, c.pages, 16, c.size), F32),
        jax.ShapeDtypeStruct((c.packs, c.rows, c.pages, 16), dtype),
        jax.ShapeDtypeStruct((c.packs, c.rows, c.size), dtype),
    ]
    text = lower_for_cuda(lambda *a: pack_glu_backward(*a, activation, interpret=False), *shapes)
    assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("name", SHAPES)
def test_numerics_on_the_device(name: str, dtype: jnp.dtype) -> None:
    arrays = SHAPES[name].arrays(dtype)
    got, want = gradients("silu", *arrays, config=None), reference("silu", *arrays)
    for one, other in zip(got, want, strict=True):
        scale = float(jnp.abs(other).max())
        assert_close(one.astype(F32) / scale, other / scale, "logits_f32" if dtype == F32 else "bf16_grad")


@pytest.mark.gpu
def test_repeats_give_one_bit_pattern() -> None:
    arrays = Case(2, 512, 2048, 1024, 2).arrays(jnp.bfloat16)
    want = gradients("silu", *arrays, config=None)
    for _ in range(50):
        for one, other in zip(gradients("silu", *arrays, config=None), want, strict=True):
            np.testing.assert_array_equal(one, other)
