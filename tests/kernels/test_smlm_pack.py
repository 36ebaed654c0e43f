"""LoRA of training packs against a plain einsum and its autodiff; packs do not see each other."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.smlm import pack_lora
from tests.tolerances import assert_close

G, L, SIZE, OUT = 3, 64, 48, (32, 16, 16)


def arrays(dtype: jnp.dtype = jnp.float32, pages: int = 2) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    shapes = [(G, L, SIZE), (G, pages, len(OUT) * 16, SIZE), (G, pages, 16, sum(OUT)), (G, L, sum(OUT))]
    x, A, B, dy = (rng.normal(size=shape) for shape in shapes)
    return [jnp.asarray(a, dtype) for a in (x, A * SIZE**-0.5, B * 0.25, dy)]


def plain(x: jax.Array, A: jax.Array, B: jax.Array) -> jax.Array:
    """Per target, in full: no stacking, no fused columns."""
    deltas, start = [], 0
    for i, size in enumerate(OUT):
        A_i, B_i = A[:, :, i * 16 : (i + 1) * 16], B[..., start : start + size]
        W = jnp.einsum("gmri,gmro->gio", A_i, B_i, precision="highest")
        deltas.append(jnp.einsum("gli,gio->glo", x, W, precision="highest"))
        start += size
    return jnp.concatenate(deltas, axis=-1)


def packs(x: jax.Array, A: jax.Array, B: jax.Array) -> jax.Array:
    return pack_lora(x, A, B, OUT)


@partial(jax.jit, static_argnums=0)
def value_and_vjp(
    f: Callable[..., jax.Array], x: jax.Array, A: jax.Array, B: jax.Array, dy: jax.Array
) -> list[jax.Array]:
    value, transpose = jax.vjp(f, x, A, B)
    return [value, *transpose(dy)]


def test_value_and_gradients() -> None:
    x, A, B, dy = arrays()
    want, got = value_and_vjp(plain, x, A, B, dy), value_and_vjp(packs, x, A, B, dy)
    for one, other in zip(got, want, strict=True):
        assert_close(one, other, "logits_f32")


def test_bfloat16_rows_give_float32_gradients_of_float32_pages() -> None:
    x, A, B, dy = arrays(jnp.bfloat16)
    pages = A.astype(jnp.float32), B.astype(jnp.float32)
    got, dx, dA, dB = value_and_vjp(packs, x, *pages, dy)
    assert (got.dtype, dx.dtype, dA.dtype, dB.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32)
    np.testing.assert_array_equal(got, pack_lora(x, A, B, OUT))
    wide = [a.astype(jnp.float32) for a in (x, A, B, dy)]
    for one, other in zip((dx, dA, dB), value_and_vjp(plain, *wide)[1:], strict=True):
        scale = float(jnp.abs(other).max())
        assert_close(one.astype(jnp.float32) / scale, other / scale, "bf16_grad")


def test_a_pack_keeps_its_bits_beside_any_other() -> None:
    x, A, B, dy = arrays()
    alone = value_and_vjp(packs, x[1:2], A[1:2], B[1:2], dy[1:2])
    beside = value_and_vjp(packs, x.at[0].set(jnp.nan), A.at[2].set(jnp.inf), B, dy)
    for one, other in zip(alone, beside, strict=True):
        np.testing.assert_array_equal(one[0], other[1])


def test_absent_pages_add_nothing() -> None:
    x, A, B, _ = arrays(pages=1)
    padded = [jnp.concatenate([a, jnp.zeros_like(a)], axis=1) for a in (A, B)]
    assert_close(pack_lora(x, *padded, OUT), pack_lora(x, A, B, OUT), "f32")


def test_bad_shapes_are_refused() -> None:
    x, A, B, _ = arrays()
    with pytest.raises(ValueError, match=r"A: got shape \(3, 2, 48, 48\), expected \(3, 2, 32, 48\)"):
        pack_lora(x, A, B, (32, 32))
