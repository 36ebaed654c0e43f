"""Invariant 3: after warm-up nothing compiles; what is outside the list of buckets is refused, not compiled."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from loquetier_jax.adapters.peft import write_peft
from loquetier_jax.batch.rows import empty_batch, ravel
from loquetier_jax.config import Bucket
from tests.engine.engines import PACK, SERVE, add_random_adapter, greedy, random_data, random_prompt
from tests.engine.evidence import LORA, compilations, finish, prompts, settle, train_config
from tests.step.cases import random_adapter, tiny_spec

# A base whose shapes no other test has: nothing of it has been compiled in this process before.
SPEC = tiny_spec(hidden_size=96, intermediate_size=112, num_hidden_layers=1, sliding_window=(None,))
BUCKETS = (
    Bucket(**SERVE, score_packs=1, score_tokens=2 * PACK),
    Bucket(**SERVE, packs=1, pack_tokens=PACK),
)
SERVING = (Bucket(**SERVE), Bucket(**SERVE, score_packs=1, score_tokens=PACK))

LEVELS = greedy(3, logprobs=0), greedy(3, logprobs=2), greedy(3, temperature=0.9), greedy(3, frequency_penalty=0.5)


@pytest.fixture(scope="module")
def engine(make_engine):
    """Warm: made, and one job of the kind that the tests run has been through."""
    made = make_engine(SPEC, share=False, buckets=BUCKETS)
    made.finetune("first", random_data(0), lora=LORA, train=train_config(max_steps=2)).wait()
    settle(made)
    return made


def check_nothing(compiled):
    assert not compiled, f"compiled after warm-up: {compiled}"


def random_mix(engine, seed, folder, steps=120):
    """Requests of every kind, loads, evictions, publishing, scoring, jobs; yields after every step."""
    rng, jobs = np.random.default_rng(seed), []
    live = []
    for i in range(steps):
        act = rng.integers(8)
        names = engine.adapters.names()
        name = names[rng.integers(len(names))] if names and rng.random() < 0.7 else None
        if act <= 2:
            hot = {"temperature": 0.9, "top_k": 5, "presence_penalty": 0.5} if act else {}
            params = greedy(int(rng.integers(1, 20)), logprobs=int(rng.integers(0, 4)), **hot)
            live.append(engine.submit(random_prompt(rng, int(rng.integers(1, 90))), name, params))
        elif act == 3:
            add_random_adapter(engine, f"n{i}", i, int(rng.integers(1, 33)))
        elif act == 4 and live:
            engine.cancel(live[rng.integers(len(live))].request_id)
        elif act == 5 and len(engine.loop.training.device_jobs) < 2:
            cfg = train_config(max_steps=3, seed=i, learning_rate=1e-3 * float(rng.random()))
            jobs.append(engine.finetune(f"j{i}", random_data(i, 9), lora=LORA, train=cfg))
        elif act == 6 and jobs and jobs[-1].step and not jobs[-1].device_job.job.finished:
            jobs[-1].publish()
        elif act == 7:
            params = greedy(2, prompt_logprobs=2)
            live.append(engine.submit(random_prompt(rng, 30), name, params))
        engine.step()
    shape, weights = random_adapter(engine.spec, 1, 20, target_modules=["q_proj", "down_proj"])
    write_peft(folder, weights, shape, engine.spec)
    engine.load_adapter("loaded", folder, replace="loaded" in engine.adapters)
    live.append(engine.submit([3, 4, 5], "loaded", greedy(3)))
    engine.wait(lambda: all(s.finished for s in live))
    engine.log_probs(prompts(seed, 9, 60), "loaded")
    return [job.wait() for job in jobs]


@pytest.mark.slow  # in small: the soak, on an engine that others have warmed up
def test_a_random_mix_compiles_nothing(engine, tmp_path):
    with compilations() as compiled:
        jobs = random_mix(engine, 0, tmp_path)
        engine.compiler.wait()
    assert len(jobs) >= 2, "the mix has no jobs"
    check_nothing(compiled)


@pytest.mark.slow
def test_serving_compiles_nothing_from_the_first_request_on(make_engine, tmp_path):
    """Ready means ready: the first load, request, scoring and eviction of an engine's life included."""
    engine = make_engine(
        tiny_spec(hidden_size=80, num_hidden_layers=1, sliding_window=(None,)), share=False, buckets=SERVING
    )
    with compilations() as compiled:
        shape, weights = random_adapter(engine.spec, 1, 20)
        write_peft(tmp_path, weights, shape, engine.spec)
        engine.load_adapter("loaded", tmp_path)
        for i in range(14):
            add_random_adapter(engine, f"n{i}", i, 8)
            engine.generate(prompts(i, 5, 60), (f"n{i}", "loaded"), LEVELS[i % 4])
        engine.log_probs(prompts(0, 9, 60), "n3")
    check_nothing(compiled)


def test_a_shape_outside_the_list_is_refused(tiny_engine):
    """The compiled functions take their own shapes only."""
    bucket, state = tiny_engine.cfg.buckets[0], tiny_engine.state
    run = tiny_engine.functions.forward(bucket)
    flat = jnp.asarray(ravel(empty_batch(replace(bucket, decode=32), tiny_engine.cfg)))
    with pytest.raises(TypeError, match="the types for which this computation was compiled"):
        run(state.params, state.pages, state.kv, state.slots.last_token, flat)


def test_a_bucket_outside_the_list_would_be_seen(engine, monkeypatch):
    """A step in another bucket compiles, and the check tells."""
    forward = engine.functions.forward
    wider = Bucket(**SERVE, score_packs=1, score_tokens=PACK)
    monkeypatch.setattr(
        engine.functions, "forward", lambda bucket, dropout=False: (forward(wider), forward(bucket, dropout))[1]
    )
    with compilations() as compiled:
        engine.generate([[3, 4, 5]], None, greedy(2))
    with pytest.raises(AssertionError, match="unified_step"):
        check_nothing(compiled)


def test_an_operation_outside_of_jit_would_be_seen(engine, monkeypatch):
    """Arithmetic on the host's way through the loop is a compile for every new shape."""
    read = type(engine.loop).read

    def careless(self):
        jnp.zeros(self.epoch % 97 + 300) * 2
        read(self)

    monkeypatch.setattr(type(engine.loop), "read", careless)
    with compilations() as compiled:
        finish(engine, [engine.submit([3, 4, 5], None, greedy(4, logprobs=0))])
    with pytest.raises(AssertionError, match="multiply"):
        check_nothing(compiled)
