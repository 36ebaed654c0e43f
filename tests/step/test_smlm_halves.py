"""A step's LoRA is `smlm`'s own two halves: its gradients are those of `jax.grad` through the op, bit for bit."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loquetier_jax.batch.pack import StepItems, pack_step
from loquetier_jax.step import ops, replay
from pallas_kernels import scatter_add_pages, smlm
from pallas_kernels.smlm import pack_plan
from tests.step.cases import PACK, TRAIN, World, make_world, mixed_items, tiny_config, tiny_spec
from tests.step.passes import check_gradients, run_pass
from tests.tolerances import assert_close

ONE_LAYER = {"num_hidden_layers": 1, "sliding_window": (None,)}


def both(world: World, group: str) -> tuple[Any, Any]:
    """Gradients of the input and the pages of a projection of two packs: by the step, and through the op.

    The step's are float32, scattered into pools of the pages' shapes, as `jax.grad` gives them.
    """
    items = StepItems(train=mixed_items(np.random.default_rng(0)).train)
    batch = jax.tree.map(jnp.asarray, pack_step(items, TRAIN, world.cfg)[0])
    weights, pages = world.state.params["layers"][0], world.state.pages.layers[0]
    (size, outs), plan = world.spec.group_shapes[group], pack_plan(batch.train.pages, PACK)
    h, dy = (
        jax.random.normal(jax.random.key(n), (TRAIN.rows, n), jnp.dtype(world.cfg.dtype)) for n in (size, sum(outs))
    )

    def by_step(h: jax.Array, pair: Any) -> Any:
        layer = (world.spec, world.cfg, TRAIN, 0, weights, {group: pair}, None, batch)
        forward = ops.ForwardOps(*layer, ops.lora_plan(batch, TRAIN))
        forward.linear(group, h)
        taps = jax.tree.map(lambda a: jnp.zeros((*plan.pack_pages.shape, *a.shape[1:])), pair)

        def linear(h: jax.Array, taps: Any) -> jax.Array:
            layer = (0, jnp.int32(0), weights, {group: pair}, plan, {group: taps}, forward.kept, batch.train)
            return replay.ReplayOps(world.spec, world.cfg, PACK, *layer).linear(group, h)

        dh, delta = jax.vjp(linear, h, taps)[1](dy)
        pools = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), pair)
        return dh, scatter_add_pages(pools, plan.pack_pages, delta, implementation=world.cfg.smlm)

    def through_the_op(h: jax.Array, pair: Any) -> Any:
        def linear(h: jax.Array, pair: Any) -> jax.Array:
            y = weights[group].dot(h)
            return smlm(h, pair.A, pair.B, plan, y=y, out_features=outs, implementation=world.cfg.smlm)

        return jax.vjp(linear, h, pair)[1](dy)

    return jax.jit(by_step)(h, pages[group]), jax.jit(through_the_op)(h, pages[group])


@pytest.mark.bits
@pytest.mark.also_gpu
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "group",
    [pytest.param(name, marks=pytest.mark.slow) for name in ("qkv_proj", "o_proj")] + ["gate_up_proj", "down_proj"],
)
def test_gradients_are_those_of_jax_grad_through_the_op(group: str, dtype: str) -> None:
    """In bfloat16 the step's are not rounded yet: rounded once, they are the op's."""
    world = make_world(tiny_spec(**ONE_LAYER), tiny_config(dtype=dtype))
    (dh, got), (want_dh, want) = both(world, group)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.dtype == jnp.float32 and one[1].any()
        np.testing.assert_array_equal(np.asarray(one.astype(dtype))[1:], np.asarray(other)[1:])
    # dX is added to the base's gradient: once in float32 by the kernels, by jax in its own dtype.
    assert_close(dh, want_dh, "f32" if dtype == "float32" else "bf16_grad")


def broken_forward(*args: Any, **options: Any) -> Any:
    out, S, plan = real_forward(*args, **options)
    return out, None if S is None else S * 1.01, plan


def broken_backward(*args: Any, **options: Any) -> Any:
    dx, dA, dB = real_backward(*args, **options)
    return dx, dA * 1.01, dB


real_forward, real_backward = ops.smlm_fwd, replay.smlm_bwd


@pytest.mark.parametrize(
    ("module", "name", "broken"), [(ops, "smlm_fwd", broken_forward), (replay, "smlm_bwd", broken_backward)]
)
def test_a_broken_half_would_be_seen(
    module: Any, name: str, broken: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is made of these very functions: one per cent in either, and training's gradient is wrong."""
    monkeypatch.setattr(module, name, broken)
    cfg = tiny_config(max_logprobs=3 + ["smlm_fwd", "smlm_bwd"].index(name))  # compiled functions of its own
    world = make_world(tiny_spec(**ONE_LAYER), cfg)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_gradients(world, StepItems(train=mixed_items(np.random.default_rng(0)).train), TRAIN)


def test_every_projection_of_a_step_goes_through_the_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for module, name in ((ops, "smlm_fwd"), (ops, "smlm_glu"), (replay, "smlm_bwd")):
        real = getattr(module, name)

        def counted(*args: Any, real=real, name=name, **options: Any) -> Any:
            calls.append(name)
            return real(*args, **options)

        monkeypatch.setattr(module, name, counted)
    world = make_world(tiny_spec(**ONE_LAYER), tiny_config(max_logprobs=5))
    run_pass(world, StepItems(train=mixed_items(np.random.default_rng(0)).train), TRAIN)
    traces = calls.count("smlm_glu")  # of the layer's forward: one for what it keeps, one to compile it
    assert traces and calls.count("smlm_fwd") == 3 * traces and calls.count("smlm_bwd") == 4
