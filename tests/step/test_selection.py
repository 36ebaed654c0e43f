"""Selection without sorting, against numpy's sort, ties, signed zeros and infinities included."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loquetier_jax.step import selection
from loquetier_jax.step.selection import CHUNK


def top_k(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    values, ids = jax.jit(selection.top_k, static_argnums=1)(jnp.asarray(x), k)
    return np.asarray(values), np.asarray(ids)


def threshold(x: np.ndarray, weights: np.ndarray, target: np.ndarray) -> np.ndarray:
    """With one bit at a time and with several, which must not differ."""
    arrays = jnp.asarray(x), jnp.asarray(weights), jnp.asarray(target)
    one, several = (np.asarray(jax.jit(partial(selection.threshold, digit=n))(*arrays)) for n in (1, 4))
    np.testing.assert_array_equal(one, several)
    return one


def rows(seed: int, n: int, size: int) -> np.ndarray:
    """Logits of several kinds: continuous, with many ties, with zeros of both signs, tiny, huge, dropped."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, size)).astype(np.float32) * 4
    x[1::6] = np.round(x[1::6])
    x[2::6] = rng.choice(np.float32([-0.0, 0.0, 1.0, -1.0]), x[2::6].shape)
    x[3::6] *= 1e-30
    x[4::6] *= 1e37
    x[5::6, ::3] = -np.inf
    return x


def by_sorting(x: np.ndarray, weights: np.ndarray, target: float) -> float:
    """The definition, on one row."""
    for value in np.unique(x)[::-1]:
        if weights[x >= value].sum(dtype=np.float64) >= target:
            return value
    return np.nan


@pytest.mark.parametrize("size", [5, CHUNK, 10 * CHUNK + 1, 30 * CHUNK])
@pytest.mark.parametrize("k", [1, 5])
def test_top_k_equals_a_stable_sort(size: int, k: int):
    x = rows(size, 12, size)
    values, ids = top_k(x, k)
    want = np.argsort(-x, axis=-1, kind="stable")[:, :k]
    np.testing.assert_array_equal(values, np.take_along_axis(x, want, axis=-1))
    # XLA counts -0.0 below 0.0, numpy counts them as equal
    proper = ~(np.take_along_axis(x, want, axis=-1) == 0).any(axis=-1)
    np.testing.assert_array_equal(ids[proper], want[proper])
    np.testing.assert_array_equal(np.take_along_axis(x, ids, axis=-1), values)


def test_top_k_keeps_the_order_of_ties_across_chunks():
    x = np.zeros((1, 40 * CHUNK), np.float32)
    x[0, [7 * CHUNK + 3, 2 * CHUNK + 9, 30 * CHUNK, 7 * CHUNK + 1]] = [2, 1, 2, 1]
    _, ids = top_k(x, 6)
    assert ids.tolist() == [[7 * CHUNK + 3, 30 * CHUNK, 2 * CHUNK + 9, 7 * CHUNK + 1, 0, 1]]


@pytest.mark.parametrize("size", [1, 7, 300])
def test_threshold_with_weights_one_is_the_kth_largest(size: int):
    x = rows(3, 24, size)
    for k in {1, min(3, size), size}:
        got = threshold(x, np.ones_like(x), np.full(24, k, np.float32))
        np.testing.assert_array_equal(got, -np.sort(-x, axis=-1)[:, k - 1])


def test_threshold_with_weights_is_where_their_sum_reaches_the_target():
    x = rows(4, 24, 100)
    weights = np.random.default_rng(5).integers(0, 8, x.shape).astype(np.float32)  # exact sums
    for share in (0.01, 0.5, 0.9, 1.0):
        target = np.maximum(1, np.ceil(share * weights.sum(axis=-1))).astype(np.float32)
        got = threshold(x, weights, target)
        np.testing.assert_array_equal(got, [by_sorting(*row) for row in zip(x, weights, target, strict=True)])


def test_a_target_that_is_never_reached_excludes_nothing():
    x = rows(6, 6, 50)
    got = threshold(x, np.ones_like(x), np.full(6, 51, np.float32))
    assert not (x < got[:, None]).any()
