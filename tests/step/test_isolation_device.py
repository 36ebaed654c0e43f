"""One bucket on a GPU: whatever becomes of one adapter, no bit moves in any row that is not its own."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loquetier_jax.step.compiled import TrainKey
from loquetier_jax.train.micro_step import MicroStep
from tests.step.cases import MIXED, PACK, World, make_world, mixed_items, tiny_config

pytestmark = pytest.mark.gpu

KEY = TrainKey(packs=2, pack_tokens=PACK, pages=2)
OTHERS_KV = [*range(1, 7), *range(9, 13)]  # of `mixed_items`, but 7 and 8: the decode row of the adapter at page 1
CHANGES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "other weights": lambda page: 3 * page[::-1],
    "absent": jnp.zeros_like,
    "nan": lambda page: jnp.full_like(page, jnp.nan),
    "inf": lambda page: jnp.full_like(page, jnp.inf),
}


def numbers(world: World, change: Callable[[jax.Array], jax.Array]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(of the others, its own): what a mixed step and its backward compute once the adapter at page 1 has changed.

    It has one of two train packs, and one of three decode rows; `pack_step` has put all in an order of its own.
    """
    world.state.pages = jax.tree.map(lambda a: a.at[1].set(change(a[1])), world.state.pages)
    items = mixed_items(np.random.default_rng(0))
    out, batch = world.run(items, MIXED)
    drawn = world.sample(out, items, MIXED)
    passing = MicroStep(KEY, items.train)
    passing.take_fused(out, batch, world.functions, world.state)
    while not passing.done:
        passing.run_backward_slice(world.functions, world.state)
    pack = [item.pages for item in items.train].index((1,))
    row = sorted(request.adapter_pages for request in items.decode).index((1,))  # as `pack_step` groups them
    logp, grads = np.asarray(out.train["logp"]).reshape(-1, PACK), jax.tree.map(np.asarray, world.state.grads)
    sampled = {name: np.asarray(a) for name, a in drawn.items()}
    own = {
        "train": logp[pack],
        "sampled": {name: a[row] for name, a in sampled.items()},
        "grads": jax.tree.map(lambda a: a[1], grads),
    }
    others = {
        "train": np.delete(logp, pack, axis=0),
        "score": jax.tree.map(np.asarray, out.score),
        "sampled": {name: np.delete(a, row, axis=0) for name, a in sampled.items()},
        "grads": jax.tree.map(lambda a: a[[2, 3]], grads),
        "kv": jax.tree.map(lambda a: np.asarray(a)[OTHERS_KV], world.state.kv),
    }
    return others, own


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("change", CHANGES)
def test_nothing_of_one_adapter_reaches_another(change: str, dtype: str) -> None:
    cfg = tiny_config(dtype=dtype)
    others, own = numbers(make_world(cfg=cfg), lambda page: page)
    others_after, own_after = numbers(make_world(cfg=cfg), CHANGES[change])
    for part in others:
        jax.tree.map(np.testing.assert_array_equal, others_after[part], others[part])
        assert all(np.isfinite(a.astype(np.float32)).all() for a in jax.tree.leaves(others[part])), part
    for part in own:
        pairs = zip(jax.tree.leaves(own[part]), jax.tree.leaves(own_after[part]), strict=True)
        assert any((one != other).any() for one, other in pairs), f"{part}: the change is meant to show"
