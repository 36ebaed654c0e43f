"""Gradients of groups reach their pages, in order, and no other page."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.page_scatter import scatter_add_pages
from pallas_kernels.page_scatter.triton import scatter_add_triton
from pallas_kernels.page_scatter.xla import MAX_UNROLLED

IDS = {
    "one pack": [[3]],
    "packs share pages": [[2, 4], [5, 0], [2, 1], [4, 2]],  # three have page 2, two page 4
    "an unused pack": [[1, 2], [0, 0]],
    "many groups": [[1 + g % 6] for g in range(MAX_UNROLLED + 4)],
}
SHAPES = {"qkv": ((48, 100), (16, 30)), "o": ((16, 1024), (16, 64))}  # multiples of a block and not


def trees(name: str) -> tuple[Any, jax.Array, Any]:
    """(pools, ids, deltas)."""
    rng, ids = np.random.default_rng(0), jnp.asarray(IDS[name], jnp.int32)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) * 1e3, jnp.float32)

    shapes = SHAPES.items()
    pools = {group: tuple(draw(7, *shape) for shape in pair) for group, pair in shapes}
    return pools, ids, {group: tuple(draw(*ids.shape, *shape) for shape in pair) for group, pair in shapes}


@pytest.mark.parametrize("implementation", ["xla", pytest.param("triton", marks=pytest.mark.also_gpu)])
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "an unused pack" else n for n in IDS])
def test_the_bits_are_those_of_one_pack_after_the_other(name: str, implementation: str) -> None:
    pools, ids, deltas = trees(name)
    got = scatter_add_pages(pools, ids, deltas, implementation=implementation)
    assert jax.tree.structure(got) == jax.tree.structure(pools)
    for pool, delta, one in zip(*map(jax.tree.leaves, (pools, deltas, got)), strict=True):
        want = np.array(pool)
        for g, m in np.ndindex(*ids.shape):
            want[ids[g, m]] += np.asarray(delta)[g, m]
        np.testing.assert_array_equal(one[1:], want[1:])
        assert np.isfinite(one[0]).all()


@pytest.mark.also_gpu
def test_nan_stays_in_its_page() -> None:
    pools, ids, deltas = trees("packs share pages")
    want = scatter_add_triton(pools, ids, deltas)
    got = scatter_add_triton(pools, ids, jax.tree.map(lambda a: a.at[2].set(jnp.nan).at[1, 1].set(jnp.nan), deltas))
    for one, other in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert np.isnan(one[1:3]).all()
        np.testing.assert_array_equal(np.asarray(one)[[0, 3, 4, 5, 6]], np.asarray(other)[[0, 3, 4, 5, 6]])


def test_lowers_for_cuda_in_place(lower_for_cuda: Callable[..., str]) -> None:
    def shaped(*lead: int) -> Any:
        groups = {"qkv": ((48, 4096), (16, 6144)), "down": ((16, 14336), (16, 4096))}
        return {g: tuple(jax.ShapeDtypeStruct((*lead, *s), jnp.float32) for s in pair) for g, pair in groups.items()}

    arguments = shaped(9), jax.ShapeDtypeStruct((4, 2), jnp.int32), shaped(4, 2)
    text = lower_for_cuda(lambda *a: scatter_add_triton(*a, interpret=False), *arguments, donate_argnums=0)
    assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 1
    assert text.count("output_operand_aliases") == 1


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_shapes_are_refused_with_both_named(implementation: str) -> None:
    pool = [jnp.zeros((5, 16, 8), jnp.float32)]
    for ids, shape in (((2, 1), (1, 1, 16, 8)), ((1, 1), (1, 1, 16, 4))):
        delta = [jnp.zeros(shape, jnp.float32)]
        with pytest.raises(ValueError, match=r"deltas\[0\]: got shape"):
            scatter_add_pages(pool, jnp.ones(ids, jnp.int32), delta, implementation=implementation)
