"""Decode-only steps take the LoRA delta beside the base GEMM where there are kernels for it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loquetier_jax.batch.pack import StepItems, pack_step
from loquetier_jax.config import Bucket
from loquetier_jax.step import compiled as functions
from loquetier_jax.step import ops
from pallas_kernels.common import cpu_bits
from tests.kernels.quick import quick_jit
from tests.step.cases import make_world, mixed_items
from tests.tolerances import assert_close

DECODE, MIXED = Bucket(decode=4), Bucket(prefill=16, chunks=1, decode=4)


@pytest.fixture(scope="module")
def world():
    return make_world()


def linear(world, smlm: str, group: str, rows: jax.Array) -> tuple[jax.Array, str]:
    """In a decode step of three adapters' rows, one of them of two pages, and one of none; and its trace."""
    items = StepItems(decode=mixed_items(np.random.default_rng(0)).decode)
    batch = jax.tree.map(jnp.asarray, pack_step(items, DECODE, world.cfg)[0])
    cfg = dataclasses.replace(world.cfg, smlm=smlm)
    weights, pages = world.state.params["layers"][0], world.state.pages.layers[0]

    def run(weights, pages, batch, rows):
        plan = ops.lora_plan(batch, DECODE)
        return ops.ForwardOps(world.spec, cfg, DECODE, 0, weights, pages, None, batch, plan).linear(group, rows)

    arguments = (weights, pages, batch, rows)
    return quick_jit(run)(*arguments), str(jax.make_jaxpr(run)(*arguments))


@pytest.mark.parametrize("group", ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])
def test_the_delta_beside_the_gemm_is_the_delta(world, group: str) -> None:
    rows = jax.random.normal(jax.random.key(0), (4, world.spec.group_shapes[group][0]))
    want, _ = linear(world, "xla", group, rows)
    got, trace = linear(world, "triton", group, rows)
    assert "smlm_delta_expand" in trace
    assert_close(got, want, "f32")


def test_other_buckets_and_other_devices_compile_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    assert functions.compiler_options(DECODE) == cpu_bits.compiler_options()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert functions.compiler_options(MIXED) == {}


def test_this_xla_knows_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    options = functions.compiler_options(DECODE)
    monkeypatch.undo()
    assert options
    jax.jit(lambda x: x + 1).lower(jnp.zeros(4)).compile(options)
