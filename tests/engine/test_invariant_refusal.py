"""Invariant 7: what is refused is named and changes nothing; pages, slots and versions add up at every step."""

import json

import numpy as np
import pytest

from loquetier_jax.adapters.lora import LoraConfig
from loquetier_jax.errors import (
    AdapterError,
    CapacityError,
    ConfigError,
    DataError,
    EngineError,
    IntegrityError,
    JobError,
    ModelError,
    RequestError,
)
from loquetier_jax.pool import IdPool
from loquetier_jax.sampling_params import SamplingParams
from loquetier_jax.serve.kv import KVPages
from loquetier_jax.serve.queue import RequestQueue
from tests.engine.engines import BUCKETS, add_random_adapter, greedy, kindred_prompt, random_data
from tests.engine.evidence import LORA, PAIR, finish, owners, prompts, settle, state_of, train_config
from tests.step.cases import random_adapter


@pytest.fixture
def engine(make_engine, tokenizer):
    made = make_engine(buckets=(*BUCKETS, PAIR), tokenizer=tokenizer)
    add_random_adapter(made, "a", 1, 8)
    return made


SUBMITS = {
    "unknown adapter": ({"adapter": "nobody"}, AdapterError, "'nobody'"),
    "unknown adapter, scored": (
        {"adapter": "nobody", "params": greedy(4, prompt_logprobs=1)},
        AdapterError,
        "'nobody'",
    ),
    "no tokens": ({"prompt": []}, RequestError, "prompt"),
    "foreign token": ({"prompt": [3, 272]}, RequestError, "token id 272"),
    "negative token": ({"prompt": [3, -1]}, RequestError, "token id -1"),
    "not a prompt": ({"prompt": {"a": 1}}, RequestError, "prompt: got"),
    "oversized prompt": ({"prompt": [3] * 128}, RequestError, "128 tokens"),
    "oversized output": ({"params": greedy(1000)}, RequestError, "max_tokens 1000"),
    "id in use": ({"request_id": "long"}, RequestError, "request_id: got 'long'"),
    "too many logprobs": ({"params": greedy(4, logprobs=17)}, RequestError, "logprobs: got 17"),
    "too many biases": (
        {"params": greedy(4, logit_bias=dict.fromkeys(range(65), 1.0))},
        RequestError,
        "logit_bias: got '65",
    ),
    "foreign bias": ({"params": greedy(4, logit_bias={999: 1.0})}, RequestError, "999"),
    "foreign stop id": ({"params": greedy(4, stop_token_ids=[272])}, RequestError, "272"),
    "too many held": (
        {"params": greedy(4, min_tokens=2, stop_token_ids=list(range(17)))},
        RequestError,
        "17 ids",
    ),
}

PARAMS = {
    "temperature": -1.0,
    "top_p": 0.0,
    "top_k": -2,
    "min_p": 2.0,
    "n": 0,
    "max_tokens": 0,
    "presence_penalty": 3.0,
    "repetition_penalty": float("nan"),
    "seed": -1,
    "logprobs": 1.5,
    "stop": [""],
}


def submit_refused(engine, arguments, error, named):
    arguments = {"prompt": [3, 4, 5], "adapter": "a", "params": greedy(4)} | arguments
    with pytest.raises(error, match=named):
        engine.submit(**arguments)


def check_refusals(engine, refuse_all):
    """Runs three requests and a job; refuses everything between two steps; returns their numbers."""
    params = greedy(50, logprobs=0)
    submitted = [engine.submit(p, n, params) for p, n in zip(prompts(0, 9, 70), ("a", None), strict=True)]
    submitted.append(engine.submit([3, 4], "a", params, request_id="long"))
    job = engine.finetune("job", random_data(0), lora=LORA, train=train_config(max_steps=3))
    engine.wait(lambda: job.step >= 1)
    submitted.append(engine.submit([3, 4], "a", greedy(8, logprobs=0), request_id="queued"))
    before = state_of(engine)
    refuse_all(engine)
    assert state_of(engine) == before, "a refusal has left its traces"
    unseeded = engine.submit([5, 6], None, SamplingParams(max_tokens=20, logprobs=0, ignore_eos=True))
    job.wait()
    return finish(engine, [*submitted, unseeded]), job.metrics[-1]["loss"]


@pytest.fixture(scope="module")
def undisturbed(make_engine, tokenizer):
    made = make_engine(buckets=(*BUCKETS, PAIR), tokenizer=tokenizer)
    add_random_adapter(made, "a", 1, 8)
    return check_refusals(made, lambda engine: None)


def refuse_requests(engine):
    for arguments, error, named in SUBMITS.values():
        submit_refused(engine, arguments, error, named)
    for name, value in PARAMS.items():
        with pytest.raises(RequestError, match=f"^{name}"):
            SamplingParams(**{name: value})
    with pytest.raises(RequestError, match="token id 999"):
        engine.generate([[3, 4], [999], [5]], "a", greedy(4))
    with pytest.raises(RequestError, match=r"sequences\[1\]"):
        engine.log_probs([[3, 4], [5]], "a")
    with pytest.raises(AdapterError, match="'nobody'"):
        engine.log_probs([[3, 4]], "nobody")


def test_refused_requests_are_named_and_leave_no_trace(engine, undisturbed):
    assert check_refusals(engine, refuse_requests) == undisturbed


def data_file(folder, *lines):
    path = folder / f"data-{len(list(folder.iterdir()))}.jsonl"
    path.write_text("\n".join(lines))
    return path


def refuse_jobs(engine, folder):
    good = json.dumps({"prompt": "a", "completion": "b"})
    cfg = train_config(output_dir=str(folder / "out"), max_steps=2)

    def refused(error, named, data=None, name="new", **arguments):
        with pytest.raises(error, match=named):
            engine.finetune(name, data or random_data(1), **({"lora": LORA, "train": cfg} | arguments))

    for bad, named in (
        ("{", "not JSON"),
        ("[1]", ""),
        ('{"question": "a"}', ""),
        ('{"messages": []}', "messages"),
        (json.dumps({"prompt": "", "completion": 3}), ""),
        (json.dumps({"input_ids": [3, 272]}), "token id 272"),
    ):
        path = data_file(folder, good, good, bad, good)
        refused(DataError, f"{path.name}:3.*{named}", data=path)
        refused(DataError, f"{path.name}:3.*{named}", eval_data=path)
    refused(DataError, "no such file", data=folder / "absent.jsonl")
    refused(DataError, "no records", data=data_file(folder, ""))
    refused(DataError, r"data\[1\]", data=[{"text": "ab"}, {"what": "ab"}])
    refused(AdapterError, "'a' exists", name="a")
    refused(AdapterError, "'nobody'", init_from="nobody", lora=None)
    refused(ConfigError, "lora: got LoraConfig.*'nobody' has its own", init_from="nobody")
    refused(AdapterError, "rank 40", lora=LoraConfig(r=40, target_modules=["q_proj"]))
    refused(JobError, "'job' has not ended", name="job")
    assert not (folder / "out").exists(), "a refused job has written files"


def test_refused_jobs_are_named_and_leave_no_trace(engine, undisturbed, tmp_path):
    assert check_refusals(engine, lambda engine: refuse_jobs(engine, tmp_path)) == undisturbed


def refuse_adapters(engine, folder):
    shape, weights = random_adapter(engine.spec, 1, 8)
    wide, wide_weights = random_adapter(engine.spec, 1, 40, target_modules=["q_proj"])
    short = dict(list(weights.items())[1:])
    for error, named, call in (
        (AdapterError, "absent", lambda: engine.load_adapter("new", folder / "absent")),
        (AdapterError, "'a' exists", lambda: engine.add_adapter("a", weights, shape)),
        (AdapterError, "missing", lambda: engine.add_adapter("new", short, shape)),
        (AdapterError, "rank 40", lambda: engine.add_adapter("new", wide_weights, wide)),
        (AdapterError, "name: got ''", lambda: engine.add_adapter("", weights, shape)),
        (AdapterError, "'nobody'", lambda: engine.unload_adapter("nobody")),
        (AdapterError, "'job' exists", lambda: engine.rename_adapter("a", "job")),
        (AdapterError, "'nobody'", lambda: engine.pin_adapter("nobody")),
        (AdapterError, "'nobody'", lambda: engine.save_adapter("nobody", folder / "out")),
        (ModelError, "not loaded from a folder", lambda: engine.export_merged("a", folder / "out")),
    ):
        with pytest.raises(error, match=named):
            call()
    assert not (folder / "out").exists()


def test_refused_adapters_are_named_and_leave_no_trace(engine, undisturbed, tmp_path):
    assert check_refusals(engine, lambda engine: refuse_adapters(engine, tmp_path)) == undisturbed


def test_a_pin_without_room_changes_nothing(engine):
    for i in range(engine.cfg.max_adapters):
        add_random_adapter(engine, f"n{i}", i, 8)
        engine.pin_adapter(f"n{i}")
    before = state_of(engine)
    with pytest.raises(CapacityError, match="adapter pages"):
        engine.pin_adapter("a")
    assert state_of(engine) == before


def test_a_queued_half_of_a_refused_request_would_be_seen(engine, undisturbed, monkeypatch):
    """Queue first, look later: the refusal is named all the same, but the request is there."""
    announce = RequestQueue.announce

    def hasty(self, requests):
        self.waiting[requests[0].id] = requests[0]
        announce(self, requests)

    monkeypatch.setattr(RequestQueue, "announce", hasty)
    with pytest.raises(AssertionError, match="left its traces"):
        check_refusals(engine, refuse_requests)
    engine.loop.serving.waiting.clear()


def test_completions_of_one_request_and_other_ids_do_not_collide(engine):
    """Completion 1 of "x" is "x-1" inside: nobody else may take that name, and no request is overwritten."""
    hot = SamplingParams(n=3, max_tokens=5, seed=1, ignore_eos=True)
    first = engine.submit([3, 4], "a", hot, request_id="x")
    with pytest.raises(RequestError, match="request_id: got 'x-1'"):
        engine.submit([5, 6], "a", greedy(4), request_id="x-1")
    engine.submit([5, 6], "a", greedy(4), request_id="y-2")
    with pytest.raises(RequestError, match="request_id"):
        engine.submit([5, 6], "a", hot, request_id="y")
    engine.wait(lambda: first.finished)
    assert [len(o.token_ids) for o in first.output().outputs] == [5, 5, 5]


def test_prompt_logprobs_of_one_token_hold_nothing(engine):
    engine.generate([[5]], "a", greedy(2, prompt_logprobs=1))
    assert engine.log_probs([], "a") == []
    engine.unload_adapter("a")
    settle(engine)
    assert set(owners(engine).values()) == {0} and not engine.adapters.versions()


def random_game(engine, seed, count=150):
    """Whatever may happen, in any order; `check_integrity` after every step. In the end nobody holds anything."""
    rng, submitted, jobs = np.random.default_rng(seed), [], []
    for i in range(count):
        names = engine.adapters.names()
        name = str(rng.choice(names)) if names and rng.random() < 0.8 else None
        open_jobs = [j for j in jobs if j.status in ("queued", "running", "paused")]
        act = int(rng.integers(10))
        if act <= 3:
            params = greedy(int(rng.integers(1, 30)), prompt_logprobs=1 if act == 3 else None)
            submitted.append(engine.submit(kindred_prompt(rng, int(rng.integers(1, 90))), name, params))
        elif act == 4 and submitted:
            engine.cancel(submitted[rng.integers(len(submitted))].request_id)
        elif act == 5:
            shape, weights = random_adapter(engine.spec, i, int(rng.integers(1, 33)))
            engine.add_adapter(f"n{rng.integers(6)}", weights, shape, replace=True)
        elif act == 6 and name is not None and name not in engine.loop.training.device_jobs:
            engine.unload_adapter(name)
        elif act == 7 and len(open_jobs) < 3:
            cfg = train_config(max_steps=4, seed=i)
            jobs.append(engine.finetune(f"j{i}", random_data(i, 10), lora=LORA, train=cfg))
        elif act == 8 and open_jobs:
            job = open_jobs[rng.integers(len(open_jobs))]
            {"paused": job.resume}.get(job.status, (job.cancel, job.pause)[i % 2])()
        elif act == 9 and open_jobs and open_jobs[-1].device_job.pages:
            open_jobs[-1].publish()
        engine.step()
        engine.check_integrity()
    for job in jobs:
        if job.status == "paused":
            job.resume()
    while engine.step() or engine.compiler.busy:
        engine.check_integrity()
    assert all(s.finished for s in submitted)
    return jobs


def check_nothing_left(engine):
    settle(engine)
    for name in engine.adapters.names():
        engine.unload_adapter(name)
    assert set(owners(engine).values()) == {0} and not engine.adapters.versions()


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_pages_slots_and_versions_add_up_at_every_step(engine, seed):
    jobs = random_game(engine, seed)
    assert jobs and {j.status for j in jobs} <= {"succeeded", "cancelled"}
    check_nothing_left(engine)


def test_a_lost_page_would_be_seen(engine, monkeypatch):
    complete = IdPool.complete

    def forgetful(self, epoch):
        complete(self, epoch)
        if self.name == "KV pages" and len(self._free) > 3:
            self._free.pop()

    monkeypatch.setattr(IdPool, "complete", forgetful)
    with pytest.raises(IntegrityError, match="KV pages"):
        random_game(engine, 0, 40)


def test_a_page_freed_while_a_step_may_use_it_would_be_seen(engine, monkeypatch):
    """Given back twice: once at once, once by its owner."""
    free = KVPages.free

    def eager(self, pages, epoch):
        free(self, pages, 0)
        free(self, pages, epoch)

    monkeypatch.setattr(KVPages, "free", eager)
    with pytest.raises((IntegrityError, EngineError), match=r"KV pages|slots: got 0 in use"):
        random_game(engine, 0, 40)
