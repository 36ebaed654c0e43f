"""A weight multiplies as jnp does, and its transpose is what autodiff makes of that, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loquetier_jax.models.linear import Dense, Linear, Transposed


def draw(seed: int, *shape: int, dtype: str = "float32") -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.dtype(dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [None, 3])
def test_products_are_those_of_jnp_bit_for_bit(dtype: str, bias: int | None) -> None:
    h, dy, w = draw(0, 64, 48, dtype=dtype), draw(1, 64, 80, dtype=dtype), draw(2, 48, 80, dtype=dtype)
    b = None if bias is None else draw(bias, 80, dtype=dtype)

    def plain(h: jax.Array) -> jax.Array:
        return h @ w if b is None else h @ w + b[None]

    want, transpose = jax.vjp(plain, h)
    got = jax.jit(Dense.dot)(Dense(w, b), h), jax.jit(Dense.dot_transpose)(Dense(w, b), dy)
    for ours, theirs in zip(got, (want, transpose(dy)[0]), strict=True):
        assert ours.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(*(np.asarray(a, np.float32) for a in (ours, theirs)))


@pytest.mark.parametrize("kind", [Dense, Transposed])
def test_sums_and_results_have_the_dtype_that_is_asked_for(kind: type) -> None:
    w = draw(0, 48, 80, dtype="bfloat16")
    weight: Linear = Dense(w) if kind is Dense else Transposed(w.T)
    h, dy = draw(1, 16, 48, dtype="bfloat16"), draw(2, 16, 80, dtype="bfloat16")
    wide = [np.asarray(a, np.float64) for a in (h, dy, w)]
    pairs = (
        (weight.dot(h, jnp.float32), wide[0] @ wide[2]),
        (weight.dot_transpose(dy, jnp.float32), wide[1] @ wide[2].T),
    )
    for got, want in pairs:
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, atol=1e-4)
