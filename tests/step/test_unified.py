"""The unified step takes a tree of rows; the buffer that an engine sends is that tree, and nothing else."""

import functools

import jax
import numpy as np
import pytest

from loquetier_jax.batch.pack import pack_step
from loquetier_jax.config import Bucket
from loquetier_jax.step.unified import unified_step
from pallas_kernels.common import cpu_bits
from tests.step.cases import PACK, make_world, mixed_items, tiny_spec

BUCKET = Bucket(packs=2, pack_tokens=PACK, prefill=48, chunks=3, decode=16)


@pytest.mark.slow
def test_a_batch_as_a_tree_gives_what_its_buffer_gives() -> None:
    world = make_world(tiny_spec(num_hidden_layers=1, sliding_window=(None,)))
    items, state = mixed_items(np.random.default_rng(0)), world.state
    items.score = []
    batch = pack_step(items, BUCKET, world.cfg).batch
    step = jax.jit(functools.partial(unified_step, world.spec, world.cfg, BUCKET, False))
    args = state.params, state.pages, state.kv, state.slots.last_token, batch
    want = step.lower(*args).compile(cpu_bits.compiler_options())(*args)  # donates nothing
    out, _ = world.run(items, BUCKET)
    got = state.kv, out
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, got), jax.tree.map(np.asarray, want))
    assert out.train["logp"].shape == (2 * PACK,) and len(out.kept) == 1
