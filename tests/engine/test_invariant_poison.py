"""Invariant 2, poison: NaN and Inf in one adapter, in unused KV, in one job's activations reach nobody else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loquetier_jax.config import Bucket
from loquetier_jax.errors import JobError
from loquetier_jax.train.micro_step import MicroStep
from pallas_kernels.paged_attention import xla as paged_xla
from tests.engine.engines import BUCKETS, PACK, SERVE, add_random_adapter, greedy, random_data
from tests.engine.evidence import LORA, PAIR, finish, owners, prompts, settle, train_config, trained
from tests.step.cases import random_adapter, tiny_spec

pytestmark = pytest.mark.bits

POISON = [pytest.param(np.nan, id="nan"), pytest.param(np.inf, id="inf", marks=pytest.mark.slow)]


@pytest.fixture
def engine(make_engine):
    made = make_engine(buckets=(*BUCKETS, PAIR))
    add_random_adapter(made, "healthy", 1, 8)
    return made


def start(engine, name, seed, steps=4, **changes):
    cfg = train_config(max_steps=steps, seed=seed, **changes)
    return engine.finetune(name, random_data(seed), lora=LORA, train=cfg)


def submit_healthy(engine):
    """Requests of the healthy adapter and of the base: short ones that end, long ones that stay."""
    made = []
    for i, prompt in enumerate(prompts(3, 7, 33, 75, 20, 50, 4)):
        hot = {"temperature": 0.8, "top_p": 0.9, "seed": i} if i % 3 == 2 else {}
        params = greedy(10 + 8 * i, logprobs=0, **hot)
        made.append(engine.submit(prompt, ("healthy", None)[i % 2], params))
    return made


def everybody(engine, meanwhile=lambda engine: None):
    """Numbers of healthy requests, of a healthy job and of scoring, while `meanwhile` is done to others."""
    job = start(engine, "job", 0)
    engine.wait(lambda: job.step >= 1)
    meanwhile(engine)
    served = finish(engine, submit_healthy(engine))
    again = finish(engine, submit_healthy(engine))  # on KV pages and slots that others have left
    scored = [a.tobytes() for a in engine.log_probs(prompts(4, 30, 9, 60), "healthy")]
    return {"served": served, "again": again, "scored": scored, "job": trained(job.wait())}


def check_same(found, expected):
    for what in expected:
        assert found[what] == expected[what], f"{what}: bits have changed"


def check_clean(engine):
    """Nobody holds anything any more but the adapters that serve."""
    settle(engine)
    for version in engine.adapters.names():
        engine.unload_adapter(version)
    engine.adapters.check_integrity()
    assert set(owners(engine).values()) == {0}


@pytest.fixture(scope="module")
def quiet(make_engine):
    """The numbers of everybody when nothing is poisoned."""
    made = make_engine(buckets=(*BUCKETS, PAIR))
    add_random_adapter(made, "healthy", 1, 8)
    return everybody(made)


def poisoned_weights(spec, value):
    shape, weights = random_adapter(spec, 7, 8)
    for pair in weights.values():
        pair["lora_A"][:, ::3] = value
        pair["lora_B"][::2] = -value
    return weights, shape


@pytest.mark.parametrize("value", POISON)
def test_an_adapter_of_nan_or_inf(engine, quiet, value):
    """It serves, is scored and trained beside the others; only its own numbers are lost."""

    def load_and_use(engine):
        engine.add_adapter("sick", *poisoned_weights(engine.spec, value))
        for prompt, hot in zip(prompts(5, 9, 40, 70), ({}, {"temperature": 1.0}, {"logprobs": 2}), strict=True):
            engine.submit(prompt, "sick", greedy(50, **hot))
        cfg = train_config(max_steps=4)
        engine.finetune("sick job", random_data(5), train=cfg, init_from="sick")

    found = everybody(engine, load_and_use)
    check_same(found, quiet)
    assert not np.isfinite(engine.log_probs(prompts(4, 30), "sick")[0]).any()
    sick = engine.jobs["sick job"]
    engine.wait(lambda: sick.released)
    assert sick.status == "failed" and "not finite" in sick.error and "step 0" in sick.error
    check_clean(engine)


def poison_cache(engine, value):
    engine.state.kv = jax.tree.map(lambda a: jnp.full_like(a, value), engine.state.kv)


@pytest.mark.parametrize("value", POISON)
def test_tails_of_kv_pages_and_the_trash_page(engine, quiet, value):
    """The whole cache is poisoned before anybody has written to it: every unused tail, and the trash page."""

    def poison(engine):
        settle_requests(engine)
        poison_cache(engine, value)

    check_same(everybody(engine, poison), quiet)
    check_clean(engine)


def settle_requests(engine):
    assert not engine.loop.serving.running
    engine.drain()


def poison_kept(monkeypatch, victim, value, where="kept"):
    """Poisons what the first pass of job `victim` has kept, its own rows alone, before the backward reads it."""
    take_fused, seen = MicroStep.take_fused, []

    def poisoned(self, out, batch, functions, state):
        own = [g for g, item in enumerate(self.items) if item.grad_pages == victim()]
        if own:
            seen.append(len(self.items))
        for g in own:
            rows = slice(g * PACK, (g + 1) * PACK)
            new = jax.tree.map(lambda a, rows=rows: a.at[rows].set(value), getattr(out, where))
            out = out.replace(**{where: new})
        take_fused(self, out, batch, functions, state)

    monkeypatch.setattr(MicroStep, "take_fused", poisoned)
    return seen


def grad_pages_of(engine, name):
    return lambda: engine.jobs[name].device_job.grad_pages if name in engine.jobs else None


@pytest.mark.parametrize("where", ["kept", "hidden"])
@pytest.mark.parametrize("value", POISON)
def test_kept_activations_of_one_job(engine, quiet, monkeypatch, value, where):
    seen = poison_kept(monkeypatch, grad_pages_of(engine, "sick"), value, where)
    found = everybody(engine, lambda engine: start(engine, "sick", 1, steps=50))
    check_same(found, quiet)
    assert 2 in seen, "the sick job never shared a pass"
    sick = engine.jobs["sick"]
    engine.wait(lambda: sick.released)
    assert sick.status == "failed" and "not finite" in sick.error
    with pytest.raises(JobError, match="'sick' failed: step 0"):
        sick.wait()
    check_clean(engine)
    after = start(engine, "job", 0).wait()  # on the train pages that the sick one left
    assert trained(after) == quiet["job"]


def test_activations_poisoned_across_the_packs_would_be_seen(engine, quiet, monkeypatch):
    """The same poison in the rows of all packs: the healthy job shows it."""
    take_fused = MicroStep.take_fused

    def poisoned(self, out, batch, functions, state):
        if len(self.items) == 2:
            out = out.replace(hidden=out.hidden * jnp.float32(np.nan))
        take_fused(self, out, batch, functions, state)

    monkeypatch.setattr(MicroStep, "take_fused", poisoned)
    job = start(engine, "job", 0)
    start(engine, "sick", 1)
    engine.wait(lambda: job.released)
    with pytest.raises(AssertionError, match="job: bits"):
        check_same({"job": trained(job)}, {"job": quiet["job"]})


class Forgetful:
    """jax.numpy whose `where` masks nothing."""

    def __getattr__(self, name):
        return getattr(jnp, name)

    @staticmethod
    def where(mask, value, other):
        return value


def test_values_not_zeroed_before_the_product_would_be_seen(make_engine, monkeypatch):
    """0 x NaN is NaN: masked weights alone are not enough."""
    spec = tiny_spec(num_hidden_layers=1, sliding_window=(None,))

    def numbers(value):
        made = make_engine(spec, share=False, buckets=(Bucket(**SERVE),))
        poison_cache(made, value)
        return {"served": finish(made, [made.submit([5, 6, 7], None, greedy(8, logprobs=0))])}

    healthy = numbers(0.0)
    check_same(numbers(np.nan), healthy)
    monkeypatch.setattr(paged_xla, "jnp", Forgetful())
    with pytest.raises(AssertionError, match="served: bits"):
        check_same(numbers(np.nan), healthy)
