"""The replay backward against autodiff of the plain reference, and what its compiled code must not hold."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loquetier_jax.adapters.pages import gradients_of, read_pages
from loquetier_jax.batch.pack import StepItems, TrainItem
from loquetier_jax.step.compiled import TrainKey
from tests.step.cases import (
    MIXED,
    PACK,
    TRAIN,
    make_world,
    mixed_items,
    random_pack,
    tiny_config,
    tiny_spec,
)
from tests.step.passes import KEY, check_gradients, page_gradients, reference_loss, run_pass
from tests.tolerances import assert_close

SLOW = pytest.mark.slow
@pytest.fixture(scope="module")
def spec():
    return tiny_spec()


@pytest.mark.also_gpu
@pytest.mark.parametrize(
    ("how", "slice_layers"),
    [
        ("mixed", 0),
        pytest.param("sliced forward", 2, marks=SLOW),
        *(pytest.param(*some, marks=SLOW) for some in (("mixed", 2), ("alone", 0), ("alone", 2))),
    ],
)
def test_gradients_equal_autodiff_of_the_dense_reference(spec, how, slice_layers):
    items = mixed_items(np.random.default_rng(0))
    bucket = {"mixed": MIXED, "alone": TRAIN, "sliced forward": None}[how]
    if how != "mixed":
        items = StepItems(train=items.train)
    check_gradients(make_world(spec), items, bucket, slice_layers)


def test_two_packs_of_one_job_add_up_and_nobody_elses_pages_move(spec):
    world = make_world(spec)
    rng = np.random.default_rng(1)
    world.state.grads = jax.tree.map(lambda a: jnp.full_like(a, 0.5), world.state.grads)
    pages_before = jax.tree.map(np.asarray, world.state.pages)
    items = StepItems(train=[TrainItem(random_pack(rng, (30,)), (1,), (2,)) for _ in range(2)])
    run_pass(world, items, TRAIN)
    shape, weights = world.adapters[(1,)]
    want = jax.jit(jax.grad(lambda w: sum(reference_loss(world, w, shape, i.pack) for i in items.train)))(weights)
    after = read_pages(world.state.grads, (2,))
    got = gradients_of(jax.tree.map(lambda a: a - 0.5, after), shape, world.spec)
    for name in want:
        scale = np.abs(want[name]["lora_B"]).max()
        np.testing.assert_allclose(got[name]["lora_B"] / scale, want[name]["lora_B"] / scale, atol=2e-5)
    for leaf in jax.tree.leaves(world.state.grads):  # pages 1, 3, 4 are untouched; 0 is trash
        np.testing.assert_array_equal(np.asarray(leaf)[[1, 3, 4]], 0.5)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, world.state.pages), pages_before)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [(), ("attention",), ("qkv_proj", "o_proj")])
def test_any_subset_of_kept_activations_gives_the_gradient(keep):
    spec = tiny_spec(num_hidden_layers=2, sliding_window=(None,) * 2)  # two: a layer's dX is seen in the one below
    world, full = make_world(spec, tiny_config(keep=keep)), make_world(spec)
    items = StepItems(train=mixed_items(np.random.default_rng(2)).train)
    for w in (world, full):
        run_pass(w, items, TRAIN)
    for item in items.train:
        got, want = page_gradients(world, item), page_gradients(full, item)
        for name in want:
            scale = np.abs(want[name]["lora_A"]).max() + 1e-9
            np.testing.assert_allclose(got[name]["lora_A"] / scale, want[name]["lora_A"] / scale, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["all kept", "nothing kept", "dropout", "gemma"])
def test_the_triton_kernels_give_the_same_gradients(how):
    family = {"norm_plus_one": True, "hidden_act": "gelu_pytorch_tanh"} if how == "gemma" else {}
    spec = tiny_spec(num_hidden_layers=1, sliding_window=(None,), **family)
    rate, kept = 0.3 * (how == "dropout"), {"keep": ()} if how == "nothing kept" else {}
    train = [dataclasses.replace(item, dropout=rate) for item in mixed_items(np.random.default_rng(4)).train]
    triton, xla = (make_world(spec, tiny_config(smlm=name, **kept)) for name in ("triton", "xla"))
    for world in (triton, xla):
        run_pass(world, StepItems(train=train), TRAIN, key=dataclasses.replace(KEY, dropout=rate > 0))
    for one, other in zip(*(jax.tree.leaves(world.state.grads) for world in (triton, xla)), strict=True):
        one, other = (np.asarray(a)[1:] / np.abs(other[1:]).max() for a in (one, other))  # page 0 is a bin
        assert_close(one, other, "f32")


def test_dropout_gradient_is_that_of_the_masked_forward(spec):
    """Numerically: the loss moves along the gradient by its squared norm."""
    world = make_world(spec)
    rng = np.random.default_rng(3)
    item = TrainItem(random_pack(rng, (60,)), (1,), (1,), 0.3)
    key = TrainKey(packs=2, pack_tokens=PACK, pages=2, dropout=True)
    items = StepItems(train=[item])
    first = run_pass(world, items, TRAIN, key=key).results()[0]["logp"]
    again = run_pass(world, items, TRAIN, key=key).results()[0]["logp"]
    np.testing.assert_array_equal(first, again)
    plain = run_pass(world, StepItems(train=[item]), TRAIN).results()[0]["logp"]
    assert np.abs(first - plain).max() > 1e-4, "dropout did nothing"
    world = make_world(spec)
    loss0 = -(run_pass(world, items, TRAIN, key=key).results()[0]["logp"] * item.pack.weights).sum(
        dtype=np.float64
    )
    grads = read_pages(world.state.grads, (1,))
    norm2 = sum(float((np.asarray(g, np.float64) ** 2).sum()) for g in jax.tree.leaves(grads))
    step = 1e-3 / np.sqrt(norm2)
    world.state.pages = jax.tree.map(lambda a, g: a.at[1].add(-step * g[0]), world.state.pages, grads)
    loss1 = -(run_pass(world, items, TRAIN, key=key).results()[0]["logp"] * item.pack.weights).sum(
        dtype=np.float64
    )
    assert (loss0 - loss1) / (step * norm2) == pytest.approx(1.0, rel=0.05)
