"""Whole training passes through the step, and what their gradients are compared with."""


import jax
import jax.numpy as jnp
import numpy as np

from loquetier_jax.adapters.pages import gradients_of, read_pages
from loquetier_jax.batch.pack import StepItems, TrainItem
from loquetier_jax.models import dense
from loquetier_jax.step.compiled import TrainKey
from loquetier_jax.train.micro_step import MicroStep
from tests.step.cases import PACK, World

KEY = TrainKey(packs=2, pack_tokens=PACK, pages=2)


def samples(pack):
    """(tokens, targets, weights) of each sample of a pack."""
    for segment in sorted(set(pack.segments.tolist()) - {-1}):
        rows = pack.segments == segment
        yield pack.tokens[rows], pack.targets[rows], pack.weights[rows]


def reference_loss(world: World, weights, shape, pack):
    """-sum(weight * log-prob) of a pack through models.dense, in f32."""
    lora = {
        (m.layer, m.target): (weights[key]["lora_A"], weights[key]["lora_B"], m.scaling)
        for key, m in shape.by_key.items()
    }
    total = 0.0
    for tokens, targets, w in samples(pack):
        logits = dense.forward(world.spec, world.state.params, jnp.asarray(tokens)[None], lora)[0]
        logp = jnp.take_along_axis(
            jax.nn.log_softmax(logits, axis=-1), jnp.asarray(targets)[:, None], axis=1
        )[:, 0]
        total = total - (logp * w).sum()
    return total


def run_pass(world: World, items: StepItems, bucket, slice_layers=0, key=KEY) -> MicroStep:
    passing = MicroStep(key, items.train, slice_layers)
    if slice_layers and bucket is None:
        passing.start_slices(world.cfg, world.functions, world.state)
        while not passing.forward_done:
            passing.run_forward_slice(world.functions, world.state)
    else:
        out, batch = world.run(items, bucket, key.dropout)
        passing.take_fused(out, batch, world.functions, world.state)
        del out
    while not passing.done:
        passing.run_backward_slice(world.functions, world.state)
    return passing


def page_gradients(world: World, item: TrainItem):
    """What the pool holds for one item's adapter, at exact rank."""
    shape = world.adapters[item.pages][0]
    return gradients_of(read_pages(world.state.grads, item.grad_pages), shape, world.spec)


def check_gradients(world: World, items: StepItems, bucket, slice_layers: int = 0) -> None:
    """Of a pass, against autodiff of the dense reference."""
    passing = run_pass(world, items, bucket, slice_layers)
    for item, result in zip(items.train, passing.results(), strict=True):
        shape, weights = world.adapters[item.pages]
        reference = jax.jit(jax.value_and_grad(lambda w, s=shape, p=item.pack: reference_loss(world, w, s, p)))
        loss, want = reference(weights)
        got = page_gradients(world, item)
        assert got.keys() == want.keys()
        for name in want:
            for part in ("lora_A", "lora_B"):
                scale = np.abs(want[name][part]).max() + 1e-9
                np.testing.assert_allclose(
                    got[name][part] / scale, want[name][part] / scale, atol=2e-5, rtol=0
                )
        np.testing.assert_allclose(-(result["logp"] * item.pack.weights).sum(), loss, rtol=2e-6)
