"""Pages against the definition x @ A.T @ B.T * scaling, module by module; gradients against jax.grad."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loquetier_jax.adapters.lora import LoraShape
from loquetier_jax.adapters.pages import (
    AdapterPages,
    gradients_of,
    pages_of,
    put_pages,
    read_pages,
    take_pages,
    write_padded,
    write_pages,
)
from loquetier_jax.errors import IntegrityError
from loquetier_jax.models.spec import GROUPS
from tests.adapters.cases import MIXED, RANKS, SPEC, random_weights, uniform

SHAPES = [pytest.param(uniform(r), id=f"r{r}") for r in RANKS] + [pytest.param(MIXED, id="mixed")]


def delta_of_pages(pages: AdapterPages, layer: int, group: str, x: np.ndarray) -> np.ndarray:
    """The kernel's definition, page by page and target by target, f64."""
    pair = pages.layers[layer][group]
    a, b = np.asarray(pair.A, np.float64), np.asarray(pair.B, np.float64)
    out = np.zeros((x.shape[0], b.shape[-1]))
    starts = np.cumsum((0, *SPEC.group_shapes[group][1]))
    for page in range(a.shape[0]):
        for i in range(len(GROUPS[group])):
            columns = slice(starts[i], starts[i + 1])
            out[:, columns] += (x @ a[page, i * 16 : (i + 1) * 16].T) @ b[page][:, columns]
    return out


def delta_of_weights(weights: dict, shape: LoraShape, layer: int, group: str, x: np.ndarray) -> np.ndarray:
    parts = []
    for target, out in zip(GROUPS[group], SPEC.group_shapes[group][1], strict=True):
        module = shape.by_key.get(f"layers.{layer}.{target}")
        if module is None:
            parts.append(np.zeros((x.shape[0], out)))
            continue
        w = {k: v.astype(np.float64) for k, v in weights[f"layers.{layer}.{target}"].items()}
        parts.append(x @ w["lora_A"].T @ w["lora_B"].T * module.scaling)
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("shape", SHAPES)
def test_pages_give_the_deltas_of_the_modules(shape: LoraShape) -> None:
    weights = random_weights(shape)
    pages = pages_of(weights, shape, SPEC, np.float32)
    for layer in range(SPEC.num_hidden_layers):
        for group, (features, _) in SPEC.group_shapes.items():
            assert pages.layers[layer][group].A.shape[0] == pages.num_pages == shape.num_pages
            x = np.random.default_rng(1).standard_normal((5, features))
            expected = delta_of_weights(weights, shape, layer, group, x)
            # The scaling is rounded into B once, in f32.
            np.testing.assert_allclose(delta_of_pages(pages, layer, group, x), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_host_and_device_casts_agree_bit_for_bit(dtype: type) -> None:
    weights = random_weights(MIXED)
    host = pages_of(weights, MIXED, SPEC, dtype)
    device = jax.jit(lambda w: pages_of(w, MIXED, SPEC, dtype))(jax.tree.map(jnp.asarray, weights))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(host))
    jax.tree.map(np.testing.assert_array_equal, host, jax.tree.map(np.asarray, device))


def test_gradients_are_those_of_the_exact_rank_weights() -> None:
    weights = jax.tree.map(jnp.asarray, random_weights(MIXED))
    cotangent = jax.tree.map(
        lambda leaf: np.random.default_rng(2).standard_normal(leaf.shape).astype(np.float32),
        pages_of(random_weights(MIXED), MIXED, SPEC, np.float32),
    )

    def loss(w: dict) -> jax.Array:
        products = jax.tree.map(lambda p, c: jnp.sum(p * c), pages_of(w, MIXED, SPEC, jnp.float32), cotangent)
        return sum(jax.tree.leaves(products))

    expected = jax.jit(jax.grad(loss))(weights)
    actual = gradients_of(cotangent, MIXED, SPEC)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_pages_round_trip_through_the_stacks_and_touch_nothing_else() -> None:
    stacks = AdapterPages.empty(SPEC, 8, jnp.float32)
    first, second = random_weights(MIXED, 1), random_weights(uniform(1), 2)
    stacks = write_pages(stacks, (5, 2, 7), pages_of(first, MIXED, SPEC, np.float32))
    before = jax.tree.map(np.asarray, read_pages(stacks, (5, 2, 7)))
    stacks = write_pages(stacks, (3,), pages_of(second, uniform(1), SPEC, np.float32))
    jax.tree.map(np.testing.assert_array_equal, before, pages_of(first, MIXED, SPEC, np.float32))
    jax.tree.map(np.testing.assert_array_equal, read_pages(stacks, (5, 2, 7)), before)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(read_pages(stacks, (0, 1, 4, 6))))


def test_writing_is_in_place_and_compiles_once_per_power_of_two() -> None:
    stacks = AdapterPages.empty(SPEC, 9, jnp.float32)
    where = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(stacks)]
    compiled = []
    for ids in ((1,), (5, 3), (4, 6, 2), (8, 7, 1, 5)):
        old, new = jax.tree.leaves(stacks), of_rank(16 * len(ids))
        stacks = write_pages(stacks, ids, new)
        compiled.append(write_padded._cache_size())
        assert all(leaf.is_deleted() for leaf in old)
        assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(stacks)] == where
        jax.tree.map(np.testing.assert_array_equal, read_pages(stacks, ids), new)
    assert compiled[2] == compiled[3], "three pages are written as four"
    assert not any(np.any(leaf[0]) for leaf in jax.tree.leaves(stacks))


def test_traced_put_and_take() -> None:
    ids = jnp.asarray([3, 1, 2], jnp.int32)
    new = pages_of(random_weights(MIXED), MIXED, SPEC, np.float32)
    stacks = jax.jit(put_pages, donate_argnums=0)(AdapterPages.empty(SPEC, 4, jnp.float32), ids, new)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(take_pages)(stacks, ids), new)


def of_rank(r: int) -> AdapterPages:
    return pages_of(random_weights(uniform(r), r), uniform(r), SPEC, np.float32)


@pytest.mark.parametrize("ids", [(0,), (8,), (-1,), (1, 2), ()])
def test_bad_page_ids_are_refused(ids: tuple[int, ...]) -> None:
    stacks = AdapterPages.empty(SPEC, 8, jnp.float32)
    new = pages_of(random_weights(uniform(8)), uniform(8), SPEC, np.float32)
    with pytest.raises(IntegrityError, match="page_ids"):
        write_pages(stacks, ids, new)
    assert not jax.tree.leaves(stacks)[0].is_deleted()


def test_layers_are_cut_and_spliced_by_reference() -> None:
    pages = AdapterPages.empty(SPEC, 2, jnp.float32)
    new = jax.tree.map(lambda leaf: leaf + 1, pages.cut(1, 2))
    spliced = pages.spliced(1, new)
    assert [len(p.layers) for p in (pages, new, spliced)] == [SPEC.num_hidden_layers, 1, SPEC.num_hidden_layers]
    expected = [*pages.layers[:1], *new.layers, *pages.layers[2:]]
    pairs = zip(jax.tree.leaves(spliced), jax.tree.leaves(expected), strict=True)
    assert all(one is other for one, other in pairs)
