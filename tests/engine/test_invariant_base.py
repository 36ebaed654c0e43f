"""Invariant 1: the base is never mutated and never copied, whatever is loaded, trained, published and served."""

import ctypes
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loquetier_jax.adapters.peft import write_peft
from loquetier_jax.models.linear import Dense
from loquetier_jax.models.load import init_random
from loquetier_jax.step import state as state_module
from tests.engine.engines import BUCKETS, SPEC, add_random_adapter, greedy, random_data
from tests.engine.evidence import LORA, PAIR, bits, finish, prompts, serve, settle, train_config
from tests.step.cases import random_adapter

SEED = 77  # a base of its own: no other test's engine holds these arrays


@pytest.fixture
def params():
    return init_random(SPEC, jax.random.key(SEED), jnp.float32)


def build(make_engine, params):
    return make_engine(params=params, buckets=(*BUCKETS, PAIR))


def buffers(tree):
    """Where every array lies."""
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


def copies(params):
    """Live arrays, beside the base, that hold what one of its matrices holds, in whatever type or orientation."""
    gc.collect()
    own = {id(leaf) for leaf in jax.tree.leaves(params)}
    wide = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(params) if leaf.ndim == 2]
    held = {a.shape: [b for b in wide if b.shape == a.shape] for a in wide}
    found = []
    for array in jax.live_arrays():
        if id(array) in own or array.is_deleted() or not jnp.issubdtype(array.dtype, jnp.floating):
            continue
        if array.shape in held or array.shape[::-1] in held:
            value = np.asarray(array, np.float32)
            same = (np.allclose(v, b, atol=1e-2) for v in (value, value.T) for b in held.get(v.shape, ()))
            found += [array] * any(same)
    return found


class Watch:
    """The base as it was: `check` says whether it still is, and is alone."""

    def __init__(self, engine, params):
        self.engine, self.params = engine, params
        self.buffers, self.bits = buffers(params), bits(params)

    def check(self):
        held = self.engine.state.params
        assert buffers(held) == self.buffers, "the engine holds other buffers"
        assert bits(self.params) == self.bits, "the base has changed"
        assert not copies(self.params), "the base has been copied"


def use(engine, folder, watch):
    """Loads, serves, trains, publishes, evicts, unloads; looks at the base in between."""
    shape, weights = random_adapter(engine.spec, 5, 8)
    write_peft(folder, weights, shape, engine.spec)
    engine.load_adapter("loaded", folder)
    for i in range(14):
        add_random_adapter(engine, f"a{i}", i, 8 if i % 2 else 24)
    watch.check()
    submitted = [engine.submit(p, f"a{i}", greedy(30)) for i, p in enumerate(prompts(0, 9, 40, 70, 3))]
    jobs = [
        engine.finetune(f"j{i}", random_data(i), lora=LORA, train=train_config(max_steps=4, seed=i)) for i in range(3)
    ]
    engine.wait(lambda: all(j.step >= 1 for j in jobs))
    watch.check()  # in the middle of passes
    jobs[0].publish()
    engine.log_probs(prompts(1, 30), "j0")
    finish(engine, submitted[:0])
    for job in jobs:
        job.wait()
    watch.check()
    for i in range(14):
        serve(engine, f"a{i}", max_tokens=2)
        engine.unload_adapter(f"a{i}")
    settle(engine)
    watch.check()


def test_base_keeps_its_buffers_and_its_bits(make_engine, params, tmp_path):
    engine = build(make_engine, params)
    watch = Watch(engine, params)
    watch.check()
    use(engine, tmp_path, watch)


def test_two_engines_share_one_base(make_engine, params):
    first, second = build(make_engine, params), build(make_engine, params)
    assert serve(first, None) == serve(second, None)
    assert buffers(first.state.params) == buffers(second.state.params) == buffers(params)
    Watch(first, params).check()


def test_a_merged_adapter_would_be_seen(make_engine, params, monkeypatch):
    """Adds the adapter's product to a weight instead of keeping it apart."""
    engine = build(make_engine, params)
    watch = Watch(engine, params)
    write = state_module.write_pages

    def merge(pages, ids, new, compiled):
        layer = engine.state.params["layers"][0]
        layer["down_proj"] = Dense(layer["down_proj"].w + jnp.float32(1e-3))
        return write(pages, ids, new, compiled)

    kept = dict(params["layers"][0])
    monkeypatch.setattr(state_module, "write_pages", merge)
    add_random_adapter(engine, "a", 0)
    serve(engine, "a", max_tokens=2)
    with pytest.raises(AssertionError, match="other buffers"):
        watch.check()
    params["layers"][0].update(kept)


def test_a_base_written_in_place_would_be_seen(make_engine, params):
    """The same buffer, another number: as a kernel that writes where it should read would leave it."""
    watch = Watch(build(make_engine, params), params)
    ctypes.c_float.from_address(params["layers"][1]["o_proj"].w.unsafe_buffer_pointer()).value += 1
    with pytest.raises(AssertionError, match="the base has changed"):
        watch.check()


@pytest.mark.parametrize("copy", [jnp.copy, lambda a: a.astype(jnp.bfloat16), lambda a: a.T])
def test_a_copy_of_the_base_would_be_seen(make_engine, params, monkeypatch, copy):
    keep = []
    new_state = state_module.new_state

    def greedy_state(spec, cfg, params, *rest):
        keep.append(jax.tree.map(copy, params["layers"]))
        return new_state(spec, cfg, params, *rest)

    monkeypatch.setattr("loquetier_jax.engine.new_state", greedy_state)
    watch = Watch(build(make_engine, params), params)
    with pytest.raises(AssertionError, match="copied"):
        watch.check()
