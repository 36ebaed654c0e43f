"""Invariant 4 at the engine: what a step hands on, and what a job holds, is of train rows and adapters alone.

The compiled code itself is looked at in tests/step/test_hlo.py.
"""

import jax
import pytest

from loquetier_jax.config import Bucket
from loquetier_jax.step import unified
from loquetier_jax.step.compiled import StepFunctions
from loquetier_jax.step.ops import shrunk
from tests.engine.engines import PACK, random_data
from tests.engine.evidence import LORA, train_config
from tests.step.cases import make_world, tiny_config, tiny_spec

# 192 train rows beside 80 + 19 others, a size of no weight: a leading size says what a result is of.
MIXED = Bucket(packs=3, pack_tokens=PACK, prefill=80, chunks=2, decode=19)


@pytest.fixture(scope="module")
def world():
    spec = tiny_spec(num_hidden_layers=1, sliding_window=(None,), intermediate_size=176)
    return make_world(spec, tiny_config(buckets=(MIXED,)))


def shapes(tree):
    return [tuple(leaf.shape) for leaf in jax.tree.leaves(tree)]


def check_residuals(world, functions):
    """What the forward keeps for the backward: rows of training alone, and nothing that the base is made of."""
    _, out = functions.forward(MIXED).out_info
    names = {"x", *world.cfg.keep, *map(shrunk, world.spec.group_shapes)}
    assert all(set(kept) == names for kept in out.kept)
    residuals = shapes((out.kept, out.hidden, out.train))
    assert {s[0] for s in residuals} == {MIXED.train_rows}, f"other rows are kept: {residuals}"
    weights = {w.shape for w in jax.tree.leaves(world.state.params["layers"]) if w.ndim == 2}
    assert not weights & set(residuals), "frozen weights are kept"


@pytest.mark.slow  # step/test_hlo.py looks at the same in the quick suite
def test_forward_keeps_train_rows_and_no_weight(world):
    check_residuals(world, world.functions)


def test_keeping_inference_rows_would_be_seen(world, monkeypatch):
    ops = unified.ForwardOps

    class Hoarder(ops):
        def keep(self, name, y):
            if name in self.cfg.keep:
                self.kept[name] = y
            return y

    monkeypatch.setattr(unified, "ForwardOps", Hoarder)
    functions = StepFunctions(world.spec, world.cfg, world.state)
    with pytest.raises(AssertionError, match="other rows"):
        check_residuals(world, functions)


def check_job(engine, job):
    """All that a job has on the device, and all that its optimizer step touches: of its adapter's size."""
    device_job = job.device_job
    adapter = sum(leaf.size for leaf in jax.tree.leaves(device_job.master))
    held = sum(leaf.size for leaf in jax.tree.leaves((device_job.master, device_job.opt_state)))
    assert held < 3 * adapter + 64, "a job holds more than its adapter and two moments"
    pools = sum(leaf.size for leaf in jax.tree.leaves((engine.state.grads, engine.state.pages)))
    touched = sum(leaf.size for leaf in jax.tree.leaves(device_job.run_optimizer.out_info))
    assert touched < held + pools + 64, "the optimizer step returns more than the job and the pools"


def test_a_job_holds_its_adapter_and_no_gradient_of_the_base(tiny_engine):
    job = tiny_engine.finetune("job", random_data(0), lora=LORA, train=train_config(max_steps=3))
    tiny_engine.wait(lambda: job.step >= 1)
    check_job(tiny_engine, job)
    device_job = job.device_job
    kept = device_job.opt_state
    device_job.opt_state = (kept, [w["down_proj"].w for w in tiny_engine.state.params["layers"]])
    with pytest.raises(AssertionError, match="more than its adapter"):
        check_job(tiny_engine, job)
    device_job.opt_state = kept
    job.wait()
