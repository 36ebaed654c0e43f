"""A step's MLP is the same whether gate, up and their activation are one kernel or not, and so is what it keeps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loquetier_jax.batch.pack import pack_step
from loquetier_jax.step import ops
from tests.kernels.quick import quick_jit
from tests.step.cases import MIXED, make_world, mixed_items
from tests.tolerances import assert_close


@pytest.fixture(scope="module")
def world():
    return make_world()


def run(world, smlm: str, keep: tuple[str, ...], hidden_act: str) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The MLP of a mixed step's rows: out, and what is kept of it."""
    items = mixed_items(np.random.default_rng(0))
    batch = jax.tree.map(jnp.asarray, pack_step(items, MIXED, world.cfg)[0])
    cfg = dataclasses.replace(world.cfg, smlm=smlm, keep=keep)
    spec = dataclasses.replace(world.spec, hidden_act=hidden_act)
    weights, pages = world.state.params["layers"][0], world.state.pages.layers[0]

    def mlp(weights, pages, batch, h):
        layer_ops = ops.ForwardOps(spec, cfg, MIXED, 0, weights, pages, None, batch, ops.lora_plan(batch, MIXED))
        return layer_ops.mlp(h), layer_ops.kept

    h = jax.random.normal(jax.random.key(0), (MIXED.rows, spec.hidden_size))
    return quick_jit(mlp)(weights, pages, batch, h)


@pytest.mark.parametrize(
    ("hidden_act", "keep"),
    [
        ("silu", ("gate_up_proj",)),
        pytest.param("silu", (), marks=pytest.mark.slow),
        pytest.param("gelu", ("gate_up_proj",), marks=pytest.mark.slow),
    ],
)
def test_fused_or_not_the_mlp_is_the_same(world, keep: tuple[str, ...], hidden_act: str) -> None:
    want, want_kept = run(world, "xla", keep, hidden_act)
    got, got_kept = run(world, "triton", keep, hidden_act)
    assert_close(got, want, "f32")
    assert want_kept.keys() == got_kept.keys() == {"gate_up_proj.S", "down_proj.S", *keep}
    for name, value in want_kept.items():
        assert_close(got_kept[name], value, "f32")
