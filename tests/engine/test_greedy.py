"""A crowd of requests beside a job says what each of them says alone."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from loquetier_jax.adapters.lora import LoraConfig
from loquetier_jax.engine import Engine
from loquetier_jax.train.config import TrainConfig
from tests.engine.engines import greedy, random_data
from tests.engine.reference import dense_logits, dense_lora
from tests.engine.traffic import Work, add_adapters, busy_engine, random_work, run_crowd

pytestmark = pytest.mark.bits

CLOSE = 1e-4  # below this gap of logits, f32 may put either of two tokens first


@pytest.fixture(scope="module", params=[24, pytest.param(200, marks=pytest.mark.slow)])
def crowd(make_engine: Callable[..., Engine], request: pytest.FixtureRequest) -> list[Work]:
    """Requests run beside a job that trains and evaluates (and drops out), with adapters evicted all along."""
    lora = LoraConfig(r=8) if request.param < 200 else LoraConfig(r=20, lora_dropout=0.1)
    engine, rng = busy_engine(make_engine), np.random.default_rng(2024)
    add_adapters(engine)
    job = engine.finetune(
        "job",
        random_data(3),
        eval_data=random_data(4, count=6),
        lora=lora,
        train=TrainConfig(max_steps=10_000, pack_tokens=64, eval_steps=4, per_device_train_batch_size=4),
    )
    engine.wait(lambda: job.step >= 1)
    work = [random_work(rng, cancelled=0.15 if request.param == 200 else 0.4) for _ in range(request.param)]
    before = job.step
    run_crowd(engine, work, rng)
    assert job.status == "running" and job.step > before + 2, "the job trained meanwhile"
    job.cancel()
    engine.wait(lambda: not engine.loop.busy and "job" not in engine.loop.training.device_jobs)
    engine.check_integrity()
    return work


def top_two_gap(logprobs: dict[int, Any]) -> float:
    first, second = sorted((entry.logprob for entry in logprobs.values()), reverse=True)[:2]
    return first - second


def test_every_request_says_in_a_crowd_what_it_says_alone(
    crowd: list[Work], make_engine: Callable[..., Engine], record_property: Callable[[str, object], None]
):
    alone = busy_engine(make_engine, enable_prefix_caching=False)
    add_adapters(alone)
    differing = []
    for number, one in enumerate(crowd):
        out = alone.generate([one.prompt], one.adapter, greedy(one.params.max_tokens, logprobs=2))[0].outputs[0]
        tokens = one.tokens
        if one.cancel_after is None:
            assert len(tokens) == one.params.max_tokens
        at = next((i for i, pair in enumerate(zip(tokens, out.token_ids, strict=False)) if pair[0] != pair[1]), None)
        if at is not None:
            differing.append((number, at, top_two_gap(out.logprobs[at])))
    cached = sum(one.submitted.output().num_cached_tokens for one in crowd)
    record_property("cached tokens", cached)
    assert cached
    record_property("requests", len(crowd))
    record_property("differing", len(differing))
    print(f"{len(differing)} of {len(crowd)} requests differ from one-at-a-time generation")
    assert all(gap <= CLOSE for _, _, gap in differing), differing
    assert len(differing) == 0, "none does on this seed"


def test_every_request_is_the_arg_max_of_the_dense_model(crowd: list[Work], make_engine: Callable[..., Engine]):
    """By induction over the tokens: each is the dense model's choice after those before it."""
    engine = busy_engine(make_engine)
    add_adapters(engine)
    checked = 0
    for adapter in {one.adapter for one in crowd}:
        work = [one for one in crowd if one.adapter == adapter and one.tokens]
        sequences = [[*one.prompt, *one.tokens][:-1] for one in work]
        for one, logits in zip(work, dense_logits(engine, sequences, dense_lora(engine, adapter)), strict=True):
            rows = logits[len(one.prompt) - 1 :]
            chosen = np.take_along_axis(rows, np.asarray(one.tokens)[:, None], axis=1)[:, 0]
            assert (rows.max(axis=1) - chosen <= CLOSE).all()
            checked += len(rows)
    assert checked > 5 * len(crowd)


def test_the_crowd_was_one(crowd: list[Work]):
    """What the tests above rest on: cancelled at every age, queued, of all adapters."""
    cancelled = [one for one in crowd if one.submitted.output().outputs[0].finish_reason == "abort"]
    assert len(cancelled) >= len(crowd) // 20
    assert any(not one.tokens for one in cancelled) and any(one.tokens for one in cancelled)
    assert len({one.adapter for one in crowd}) == 7
