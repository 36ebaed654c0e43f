"""Invariant 2, isolation: what happens to one adapter or job changes no bit of another."""

import numpy as np
import pytest

from loquetier_jax.batch.pack import pack_step
from loquetier_jax.runtime import loop
from loquetier_jax.step import state as device_state
from tests.engine.engines import BUCKETS, add_random_adapter, greedy, random_data, random_prompt
from tests.engine.evidence import (
    LORA,
    PAIR,
    bits,
    curve,
    finish,
    numbers_of,
    owners,
    serve,
    settle,
    train_config,
    trained,
)

pytestmark = pytest.mark.bits

NAMES = ("a", "b", None)


def engine_of(make_engine, names=NAMES):
    engine = make_engine(buckets=(*BUCKETS, PAIR))
    for seed, name in enumerate(n for n in names if n):
        add_random_adapter(engine, name, seed, 8 if seed % 2 else 24)
    return engine


def start_job(engine, name, steps, seed=0, **changes):
    cfg = train_config(max_steps=steps, seed=seed, **changes)
    return engine.finetune(name, random_data(seed, count=24), lora=LORA, train=cfg)


def submit_requests(engine, count, seed=0):
    """Requests of all lengths over two adapters and the base, sampled in all ways."""
    rng = np.random.default_rng(seed)
    submitted = []
    for i in range(count):
        hot = {"temperature": 0.8, "top_p": 0.9, "seed": i} if i % 3 == 1 else {}
        params = greedy(int(rng.integers(5, 40)), logprobs=i % 2, **hot)
        prompt = random_prompt(rng, int(rng.integers(3, 80)))
        submitted.append(engine.submit(prompt, NAMES[i % 3], params))
    return submitted


def train_alone(make_engine, steps, **changes):
    engine = engine_of(make_engine)
    return trained(start_job(engine, "job", steps, **changes).wait())


def train_in_company(make_engine, steps, requests, **changes):
    """The same job beside two others and requests, whose numbers come back too."""
    engine = engine_of(make_engine)
    others = [start_job(engine, f"other{i}", steps, seed=i + 1, learning_rate=1e-2) for i in range(2)]
    job = start_job(engine, "job", steps, **changes)
    submitted = []
    while not job.step and engine.step():
        pass  # compiling takes as long as all of the requests
    while not job.device_job.job.finished:
        if len(submitted) < requests:  # they come one by one while the jobs train
            submitted += submit_requests(engine, 1, seed=len(submitted))
        engine.step()
        engine.check_integrity()
    numbers = finish(engine, submitted)
    assert len(numbers) == requests and all(o.wait().step == steps for o in others)
    result = trained(job.wait())
    settle(engine)
    assert owners(engine)["KV pages"] == owners(engine)["train pages"] == 0
    return result, numbers


def check_equal(alone, together):
    assert alone["curve"] == together["curve"], "the loss curve depends on who shares the steps"
    assert alone["master"] == together["master"] and alone["opt_state"] == together["opt_state"]


@pytest.mark.parametrize("steps", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_a_job_is_the_same_alone_or_beside_two_jobs_and_twenty_requests(make_engine, steps):
    alone = train_alone(make_engine, steps)
    together, _ = train_in_company(make_engine, steps, 20)
    assert len(alone["curve"]) == steps and len({loss for loss, _ in alone["curve"]}) > 0.9 * steps
    check_equal(alone, together)


def test_requests_are_the_same_alone_or_beside_jobs(make_engine):
    _, together = train_in_company(make_engine, 8, 12)
    engine = engine_of(make_engine)
    alone = [finish(engine, submit_requests(engine, 1, seed=i))[0] for i in range(12)]
    assert alone == together


def test_gradients_in_a_neighbours_pages_would_be_seen(make_engine, monkeypatch):

    def leaky(*args):
        step = pack_step(*args)
        if step.batch.train is not None:
            step.batch.train.grad_pages[:] = step.batch.train.grad_pages[:1]
        return step

    alone = train_alone(make_engine, 4)
    monkeypatch.setattr(loop, "pack_step", leaky)
    together, _ = train_in_company(make_engine, 4, 0)
    with pytest.raises(AssertionError, match="shares the steps"):
        check_equal(alone, together)


def live_through(engine):
    """Everything that can happen to other adapters; returns numbers of b taken in between."""
    found = [serve(engine, "b")]
    job = start_job(engine, "c", 3)
    running = engine.submit([5, 6, 7], "b", greedy(60, logprobs=0))
    job.wait()
    found.append(serve(engine, "b"))
    assert serve(engine, "c") != serve(engine, None)
    for seed in range(14):  # more than there are pages: b is evicted and comes back
        add_random_adapter(engine, f"x{seed}", 10 + seed, 8)
        engine.generate([[3, 4, 5]], f"x{seed}", greedy(2))
    found.append(serve(engine, "b"))
    failing = start_job(engine, "d", 5, learning_rate=1e30)
    engine.wait(lambda: failing.released)
    assert failing.status == "failed" and "not finite" in failing.error
    for name in ("a", "c", "x3"):
        engine.unload_adapter(name)
    found.append(serve(engine, "b"))
    return found, finish(engine, [running])


def check_b_stays(found):
    assert all(numbers == found[0] for numbers in found[1:]), "b has changed"


@pytest.fixture
def quiet_b(make_engine):
    """What b says when nobody else is there."""
    engine = engine_of(make_engine)
    return serve(engine, "b"), numbers_of(engine.generate([[5, 6, 7]], "b", greedy(60, logprobs=0)))


def test_loading_training_evicting_and_failing_others_leaves_an_adapter_alone(make_engine, quiet_b):
    found, running = live_through(engine_of(make_engine))
    check_b_stays([quiet_b[0], *found])
    assert running == quiet_b[1]


def test_a_write_into_foreign_pages_would_be_seen(make_engine, monkeypatch):
    engine = engine_of(make_engine)
    found = [serve(engine, "b")]
    pages, write = engine.adapters.get("b").pages, device_state.write_pages
    monkeypatch.setattr(device_state, "write_pages", lambda old, ids, new, _: write(old, pages[: len(ids)], new))
    add_random_adapter(engine, "x", 10, 8)
    engine.generate([[3, 4, 5]], "x", greedy(2))
    found.append(serve(engine, "b"))
    with pytest.raises(AssertionError, match="b has changed"):
        check_b_stays(found)


def test_a_paused_job_keeps_every_bit_while_others_train_fail_and_leave(make_engine):
    engine = engine_of(make_engine)
    job = start_job(engine, "job", 6)
    engine.wait(lambda: job.step >= 3)
    job.pause()
    settle(engine)
    device_job = job.device_job
    before = bits((device_job.master, device_job.opt_state, device_job.accumulators(engine.state)))
    start_job(engine, "other", 4, seed=1, optim="lion").wait()
    start_job(engine, "gone", 50, seed=2)
    engine.wait(lambda: engine.jobs["gone"].step >= 2)
    engine.jobs["gone"].cancel()
    submitted = submit_requests(engine, 6)
    finish(engine, submitted)
    settle(engine)
    assert bits((device_job.master, device_job.opt_state, device_job.accumulators(engine.state))) == before
    job.resume()
    assert curve(job.wait()) == train_alone(make_engine, 6)["curve"]
