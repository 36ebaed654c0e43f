"""What the compiled code of a step must not hold: invariant 4 (frozen means free) and in-place caches."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loquetier_jax.config import Bucket
from loquetier_jax.models.linear import Dense
from loquetier_jax.step.compiled import TrainKey
from tests.step.cases import PACK, make_world, mixed_items, tiny_config

# Sizes that no weight of the tiny model has, so that a shape in the text says what it is.
BUCKET = Bucket(packs=3, pack_tokens=PACK, prefill=80, chunks=2, decode=19)
KEY = TrainKey(packs=3, pack_tokens=PACK, pages=2)

SHAPE = re.compile(r"\b(?:f32|bf16|s32|u32|pred)\[([\d,]*)\]")


def shapes(text: str, operation: str) -> set[tuple[int, ...]]:
    """Result shapes of every instruction of that kind."""
    found = re.findall(rf"= (?:f32|bf16|s32|u32|pred)\[([\d,]*)\]\S* {operation}\(", text)
    return {tuple(int(n) for n in s.split(",") if n) for s in found}


def all_leading_sizes(text: str) -> set[int]:
    return {int(s.split(",")[0]) for s in SHAPE.findall(text) if s}


@pytest.fixture(scope="module")
def world():
    return make_world()


def backward_text(world) -> str:
    return world.functions.backward_slice(KEY, 0, 2).as_text()


def weight_shapes(world) -> set[tuple[int, ...]]:
    return {w.w.shape for w in world.state.params["layers"][0].values() if isinstance(w, Dense)}


def check_backward(world, text: str) -> None:
    inference = {BUCKET.rows, BUCKET.prefill + BUCKET.decode, BUCKET.prefill, BUCKET.decode}
    assert not inference & all_leading_sizes(text), "inference rows in the backward"
    dots = shapes(text, "dot")
    gradients = weight_shapes(world) | {s[::-1] for s in weight_shapes(world)}
    assert not gradients & dots, f"a weight gradient is computed: {gradients & dots}"


def base_gemms(world, text: str) -> int:
    """Dots with a whole frozen matrix as operand: one transpose a group and layer, and none of the forward."""
    found = re.findall(r" dot\(([^)]*)\)", text)
    names = {m.group(1) for m in re.finditer(r"%(\S+) = f32\[([\d,]+)\]", text)}
    sizes = dict(re.findall(r"%(\S+) = f32\[([\d,]+)\]", text))
    weights = {",".join(map(str, s)) for s in weight_shapes(world)} | {
        ",".join(map(str, s[::-1])) for s in weight_shapes(world)
    }
    count = 0
    for operands in found:
        for operand in re.findall(r"%([\w.\-]+)", operands):
            count += operand in names and sizes.get(operand) in weights
    return count


def test_backward_has_no_inference_row_and_no_weight_gradient(world):
    check_backward(world, backward_text(world))


def test_backward_runs_each_base_gemm_once(world):
    assert base_gemms(world, backward_text(world)) == 2 * 4  # 2 layers, 4 fused groups, transposes only


@pytest.mark.mutation
def test_weight_gradient_would_be_seen(world):
    """The check bites: a projection whose weight is differentiated shows a dot of the weight's shape."""
    shape = world.state.params["layers"][0]["o_proj"].w.shape
    text = (
        jax.jit(
            lambda x, w: jax.vjp(lambda w: Dense(w).dot(x), w)[1](
                jnp.ones((3 * PACK, shape[1]))
            )
        )
        .lower(jnp.ones((3 * PACK, shape[0])), jnp.ones(shape))
        .compile()
        .as_text()
    )
    with pytest.raises(AssertionError, match="weight gradient"):
        check_backward(world, text)


@pytest.mark.mutation
def test_a_forward_that_is_recomputed_would_be_seen():
    """The count of GEMMs bites: without the kept values, projections are computed again."""
    world = make_world(cfg=tiny_config(keep=()))
    assert base_gemms(world, backward_text(world)) > 2 * 4


def cache_copies(text: str, cache_shape: tuple[int, ...]) -> list[str]:
    size = ",".join(map(str, cache_shape))
    return re.findall(rf"= f32\[{size}\]\S* copy\(", text)


def test_forward_copies_no_cache_and_no_weight(world):
    text = world.functions.forward(BUCKET).as_text()
    for shape in {world.state.kv[0].k.shape, *weight_shapes(world)}:
        assert not cache_copies(text, shape), f"a copy of {shape} in the forward"
    assert "input_output_alias" in text


@pytest.mark.parametrize("level", ["greedy", "full"])
def test_a_sampler_copies_no_slots(world, level):
    """What it does not write stays where it is; what it writes is written in place."""
    text, counts = world.functions.sampler(BUCKET.samples, level).as_text(), world.state.slots.counts.shape
    for kind in ("s32", "pred"):
        assert not re.findall(rf"= {kind}\[{counts[0]},{counts[1]}\]\S* copy\(", text)
    assert "input_output_alias" in text


@pytest.mark.mutation
def test_a_cache_that_is_not_donated_would_be_seen(world):
    cache = world.state.kv[0].k
    text = jax.jit(lambda c: c.at[1, 0].set(1.0)).lower(cache).compile().as_text()
    assert cache_copies(text, cache.shape)


def test_donated_state_is_consumed(world):
    before = jax.tree.leaves((world.state.kv, world.state.slots))
    items = mixed_items(np.random.default_rng(0))
    items.score = []
    out, _ = world.run(items, BUCKET)
    world.sample(out, items, BUCKET)
    assert all(leaf.is_deleted() for leaf in before)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((world.state.params, world.state.pages)))
