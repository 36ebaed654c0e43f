"""Invariant 6: a request runs to its end on the version it started with; a published one serves the next."""

import pytest

from loquetier_jax.adapters.registry import Registry
from loquetier_jax.adapters.store import AdapterStore
from loquetier_jax.errors import AdapterError
from loquetier_jax.serve.queue import RequestQueue
from loquetier_jax.train.device_job import DeviceJob
from tests.engine.engines import BUCKETS, add_random_adapter, greedy, random_data
from tests.engine.evidence import LORA, PAIR, finish, numbers_of, owners, prompts, settle, train_config
from tests.step.cases import random_adapter

pytestmark = pytest.mark.bits

TOKENS = 40
PROMPTS = prompts(0, 9, 40, 70)


@pytest.fixture
def engine(make_engine):
    return make_engine(buckets=(*BUCKETS, PAIR))


def submit(engine, name):
    params = greedy(TOKENS, logprobs=0)
    return [engine.submit(p, name, params) for p in PROMPTS]


def steps(engine, count):
    for _ in range(count):
        engine.step()


def replace(engine, name, seed, r=8):
    shape, weights = random_adapter(engine.spec, seed, r)
    engine.add_adapter(name, weights, shape, replace=True)


@pytest.fixture(scope="module")
def versions(make_engine):
    """What adapters of seeds 1 and 2 say, and the base, each with an engine to itself."""
    engine = make_engine(buckets=(*BUCKETS, PAIR))
    for seed, r in ((1, 24), (2, 8)):
        add_random_adapter(engine, f"v{seed}", seed, r)
    return {name: finish(engine, submit(engine, name)) for name in ("v1", "v2", None)}


def change_while_running(engine, versions, after):
    """Starts three requests, then changes what their name means; checks who gets what."""
    add_random_adapter(engine, "x", 1, 24)
    old = submit(engine, "x")
    steps(engine, after)  # 0: they are queued; 2: prompts are being read; 12: they produce
    replace(engine, "x", 2)
    new = submit(engine, "x")
    steps(engine, 3)
    engine.rename_adapter("x", "y")
    engine.unload_adapter("y")
    with pytest.raises(AdapterError, match="'x'"):
        engine.submit([3, 4], "x")
    for i in range(12):  # takes every page that can be had
        add_random_adapter(engine, f"n{i}", 20 + i, 8)
        engine.submit([5, 6, 7], f"n{i}", greedy(2))
    found = finish(engine, old), finish(engine, new)
    assert found[0] == versions["v1"], "a request changed its version"
    assert found[1] == versions["v2"], "the next request missed the new version"
    ids = {s.output().version for s in old}, {s.output().version for s in new}
    assert [len(i) for i in ids] == [1, 1] and max(ids[0]) < min(ids[1])


@pytest.mark.parametrize("after", [0, 2, 12], ids=["queued", "prefilling", "decoding"])
def test_replace_rename_unload_while_requests_run(engine, versions, after):
    change_while_running(engine, versions, after)
    settle(engine)
    for name in engine.adapters.names():
        engine.unload_adapter(name)
    assert set(owners(engine).values()) == {0}


def test_reading_the_present_version_would_be_seen(engine, versions, monkeypatch):
    items = RequestQueue.items

    def present(self, decode, prefill):
        for request in self.running.values():
            known = request.adapter in self.store
            request.adapter_pages = self.store.ensure_resident(self.store.get(request.adapter)) if known else ()
        return items(self, decode, prefill)

    monkeypatch.setattr(RequestQueue, "items", present)
    with pytest.raises(AssertionError, match="changed its version"):
        change_while_running(engine, versions, 12)


def test_choosing_the_version_at_admission_would_be_seen(engine, versions, monkeypatch):
    def late(self, version):
        return self.ensure_resident(self.get("x") if version.name == "x" and "x" in self else version)

    monkeypatch.setattr(AdapterStore, "ensure_loaded", late)
    monkeypatch.setattr(engine.adapters.loader, "start", lambda work: work())  # or they may be admitted too late
    with pytest.raises(AssertionError, match="changed its version"):
        change_while_running(engine, versions, 0)


def test_a_version_that_is_not_held_would_be_seen(engine, versions, monkeypatch):
    """Without a hold, replacing the adapter takes a queued request's version away."""
    monkeypatch.setattr(Registry, "hold", lambda self, name, count=1: self.get(name))
    monkeypatch.setattr(Registry, "drop", lambda self, version: None)
    add_random_adapter(engine, "x", 1, 24)
    old = submit(engine, "x")
    replace(engine, "x", 2)
    engine.wait(lambda: all(s.finished for s in old))
    with pytest.raises(AssertionError):
        assert numbers_of([s.output() for s in old]) == versions["v1"]


def start_job(engine, steps=12, seed=0):
    return engine.finetune("job", random_data(seed), lora=LORA, train=train_config(max_steps=steps, learning_rate=2e-2))


def publish_twice(engine, tmp_path):
    """Requests before, between and after two publishes of a job that goes on training; each with its weights."""
    job, found = start_job(engine), []
    for step in (2, 5, None):
        found.append((submit(engine, "job"), engine.adapters.get("job").id))
        queued = submit(engine, "job")  # they may have to wait until long after the publish
        found.append((queued, found[-1][1]))
        engine.save_adapter("job", tmp_path / f"served-{len(found)}")
        if step is None:
            break
        engine.wait(lambda step=step: job.step >= step)
        job.publish()
    job.wait()
    return [(finish(engine, submitted), [s.output().version for s in submitted], v) for submitted, v in found]


def check_published(engine, found, folder):
    """Every request said what the weights say that were served when it came."""
    for i, (numbers, versions, expected) in enumerate(found):
        assert set(versions) == {expected}
        name = f"check-{i}"
        engine.load_adapter(name, folder / f"served-{i // 2 * 2 + 2}")
        assert numbers == finish(engine, submit(engine, name)), f"requests {i} ran on other weights"


def test_publish_serves_the_next_request_and_no_running_one(engine, make_engine, versions, tmp_path):
    found = publish_twice(engine, tmp_path)
    other = make_engine(buckets=(*BUCKETS, PAIR))
    check_published(other, found, tmp_path)
    assert found[0][0] == versions[None], "an untrained adapter is the base"
    distinct = {tuple(numbers) for numbers, _, _ in found}
    assert len(distinct) == 3, "publishing changed nothing"


def test_training_on_in_the_published_pages_would_be_seen(engine, make_engine, monkeypatch, tmp_path):
    optimize = DeviceJob.optimize

    def in_place(self, state, store, epoch):
        fresh, self.write_pages = self.write_pages, self.pages
        metrics = optimize(self, state, store, epoch)
        self.pages = self.write_pages = fresh
        return metrics

    monkeypatch.setattr(DeviceJob, "optimize", in_place)
    found = publish_twice(engine, tmp_path)
    with pytest.raises(AssertionError, match="other weights"):
        check_published(make_engine(buckets=(*BUCKETS, PAIR)), found, tmp_path)
