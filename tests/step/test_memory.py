"""How many KV pages fit: the parts against what is really allocated, and the sum against the memory given."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from loquetier_jax.batch.rows import empty_batch, shapes_of
from loquetier_jax.config import Bucket, EngineConfig
from loquetier_jax.errors import ConfigError
from loquetier_jax.models.load import init_random
from loquetier_jax.step import memory
from loquetier_jax.step.memory import GB
from loquetier_jax.step.state import new_state
from loquetier_jax.step.unified import unified_step
from tests.step.cases import TRAIN, tiny_config, tiny_spec


def size(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_the_parts_are_what_is_allocated():
    spec, cfg = tiny_spec(), tiny_config()
    state = new_state(spec, cfg, init_random(spec, jax.random.key(0), jnp.float32))
    assert memory.kv_page_bytes(spec, cfg) * cfg.kv_pages == size(state.kv)
    assert memory.state_bytes(spec, cfg) == size((state.pages, state.grads, state.slots))
    step = partial(unified_step, spec, cfg, TRAIN, False)
    arrays = map(shapes_of, (state.params, state.pages, state.kv, state.slots.last_token, empty_batch(TRAIN, cfg)))
    _, out = jax.eval_shape(step, *arrays)
    kept = [{name: a for name, a in layer.items() if not name.endswith(".S")} for layer in out.kept]
    want = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(kept))
    assert memory.kept_row_bytes(spec, cfg) * TRAIN.train_rows == want


def llama() -> tuple:
    """8B shapes and a preset like `gpu`."""
    spec = tiny_spec(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        intermediate_size=14336, vocab_size=128256, sliding_window=(None,) * 32,
    )  # fmt: skip
    buckets = (Bucket(decode=256), Bucket(prefill=4096, chunks=16, decode=256), Bucket(packs=4, pack_tokens=1024))
    cfg = EngineConfig(
        dtype="bfloat16", max_model_len=4096, kv_page_size=64, max_num_seqs=256, max_adapters=64, buckets=buckets
    )
    return spec, cfg


def test_an_8b_model_on_80_gb():
    spec, cfg = llama()
    assert memory.kv_page_bytes(spec, cfg) == 64 * 131072
    assert memory.kept_row_bytes(spec, cfg) == pytest.approx(3.0e6, rel=0.01)  # measured: 3.0 MB a token
    assert memory.train_bytes(spec, cfg) == pytest.approx(18e9, rel=0.1)
    free = 0.92 * 79e9 - 16.1e9
    pages = memory.kv_pages_that_fit(spec, cfg, free)
    assert pages * 64 > 256 * 640, "256 requests of 512/128"
    serving = memory.kv_pages_that_fit(spec, replace(cfg, train_memory_gb=0), free)
    gained = (serving - pages) * memory.kv_page_bytes(spec, cfg)
    assert gained == pytest.approx(memory.train_bytes(spec, cfg), abs=memory.kv_page_bytes(spec, cfg))


def test_never_more_than_all_slots_need_and_never_less_than_one_request():
    spec, cfg = llama()
    assert memory.kv_pages_that_fit(spec, cfg, 1e15) == cfg.kv_pages == 1 + 256 * 64
    with pytest.raises(ConfigError, match=r"memory: got 20\.0 GB beside the base, enough for 0 .* room for 65"):
        memory.kv_pages_that_fit(spec, cfg, 20 * GB)


def test_a_number_given_or_a_device_that_does_not_tell_leave_the_config_alone():
    spec, cfg = tiny_spec(), tiny_config()
    assert memory.sized(spec, cfg) is cfg
    assert memory.sized(spec, replace(cfg, num_kv_pages=5)).num_kv_pages == 5


@pytest.mark.parametrize(("field", "value"), [("gpu_memory_utilization", 0), ("gpu_memory_utilization", 1.1),
                                              ("train_memory_gb", -1), ("train_memory_gb", float("inf"))])  # fmt: skip
def test_bad_values_are_refused(field: str, value: float):
    with pytest.raises(ConfigError, match=field):
        replace(tiny_config(), **{field: value})
