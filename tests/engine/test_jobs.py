"""Several jobs at once: each with its own shape, its own end and its own failure."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loquetier_jax.adapters.lora import LoraConfig
from loquetier_jax.engine import Engine
from loquetier_jax.errors import AdapterError, ConfigError, DataError, JobError
from loquetier_jax.train.config import TrainConfig
from loquetier_jax.train.data import Dataset
from loquetier_jax.train.handle import JobHandle
from tests.engine.engines import add_random_adapter, greedy, random_data, reset
from tests.engine.traffic import busy_engine


@pytest.fixture(scope="module")
def own_engine(make_engine: Callable[..., Engine], tokenizer: Any) -> Engine:
    return busy_engine(make_engine, tokenizer=tokenizer)


@pytest.fixture
def engine(own_engine: Engine) -> Iterator[Engine]:
    yield own_engine
    reset(own_engine)


def train(**changes: Any) -> TrainConfig:
    fields: dict[str, Any] = {
        "max_steps": 6,
        "pack_tokens": 64,
        "per_device_train_batch_size": 5,
        "learning_rate": 1e-2,
    }
    return TrainConfig(**(fields | changes))


def losses(job: JobHandle) -> list[float]:
    return [line["loss"] for line in job.metrics if "loss" in line]


@pytest.mark.slow  # the soak has jobs of all kinds, too
def test_jobs_of_all_kinds_run_at_once_and_not_in_lock_step(engine: Engine):
    kinds = {
        "adamw": (LoraConfig(r=8, target_modules="all-linear"), train()),
        "sgd": (LoraConfig(r=24), train(optim="sgd", max_steps=12, per_device_train_batch_size=1, learning_rate=0.5)),
        "lion": (LoraConfig(r=4, lora_dropout=0.2), train(optim="lion", pack_tokens=128, learning_rate=1e-3)),
        "adafactor": (LoraConfig(r=16), train(optim="adafactor", gradient_accumulation_steps=3, max_steps=4)),
    }
    jobs = {n: engine.finetune(n, random_data(3), lora=lora, train=cfg) for n, (lora, cfg) in kinds.items()}
    engine.wait(lambda: all(job.status == "running" for job in jobs.values()))
    seen = set()
    while engine.loop.training.device_jobs:
        engine.step()
        seen.add(tuple(job.step for job in jobs.values()))
    assert {job.status for job in jobs.values()} == {"succeeded"}
    assert [job.step for job in jobs.values()] == [6, 12, 6, 4]
    assert any(len(set(steps)) > 2 and min(steps) > 0 for steps in seen), "each at its own pace"
    for name, job in jobs.items():
        assert losses(job)[-1] < losses(job)[0] or name == "lion", name
    engine.check_integrity()


def test_early_stopping_ends_a_job_that_gets_worse(engine: Engine):
    cfg = train(max_steps=60, learning_rate=0.5, eval_steps=1, early_stopping_patience=2, lr_scheduler_type="constant")
    job = engine.finetune("job", random_data(4), eval_data=random_data(5, count=4), train=cfg).wait()
    evals = [line["eval_loss"] for line in job.metrics if "eval_loss" in line]
    assert job.status == "succeeded" and job.step == len(evals) < 60
    assert min(evals[-2:]) >= min(evals[:-2])


def test_a_loss_of_ones_own(engine: Engine):
    """The sum over a pack of what cross-entropy is, then the half of it: same gradient times one half."""

    def half(logp: Any, weights: Any) -> Any:
        return -0.5 * (logp * weights).sum()

    cfg = train(max_steps=4, max_grad_norm=0.0, optim="sgd", learning_rate=0.2)
    whole = engine.finetune("whole", random_data(6), train=cfg).wait()
    own = engine.finetune("own", random_data(6), train=train(**(vars(cfg) | {"loss": half}))).wait()
    assert losses(own)[0] == pytest.approx(losses(whole)[0] / 2, rel=1e-6)
    norms = [[line["grad_norm"] for line in job.metrics] for job in (own, whole)]
    assert norms[0][0] == pytest.approx(norms[1][0] / 2, rel=1e-5)
    assert losses(own)[-1] != losses(whole)[-1] / 2, "half the gradient is another path"


def test_training_goes_on_from_an_adapter(engine: Engine):
    add_random_adapter(engine, "begin", 7, 12, target_modules=["q_proj", "down_proj"])
    data = random_data(7, count=5)
    first = engine.finetune("next", data, init_from="begin", train=train(max_steps=2)).wait()
    sequences = [[*s.tokens.tolist(), int(s.targets[-1])] for s in data.samples]
    weights = [s.weights for s in data.samples]
    logp = engine.log_probs(sequences, "begin")
    want = -sum((lp * w).sum() for lp, w in zip(logp, weights, strict=True)) / sum(w.sum() for w in weights)
    assert losses(first)[0] == pytest.approx(want, rel=1e-6)
    assert engine.adapters.get("next").shape == engine.adapters.get("begin").shape
    again = engine.finetune("next", data, init_from="next", train=train(max_steps=1)).wait()
    assert losses(again)[0] < losses(first)[0]


def test_a_job_that_fails_fails_alone(engine: Engine):
    add_random_adapter(engine, "a", 8, 8)
    want = losses(engine.finetune("alone", random_data(8), train=train()).wait())
    tokens = engine.generate([[5, 6, 7]], "a", greedy(40))[0].outputs[0].token_ids

    settings = {"learning_rate": 3e38, "max_grad_norm": 0.0, "warmup_steps": 49}  # the first one's rate is 0
    bad = engine.finetune("bad", random_data(9), train=train(**settings, max_steps=50))
    good = engine.finetune("good", random_data(8), train=train())
    request = engine.submit([5, 6, 7], "a", greedy(40))
    good.wait()
    engine.wait(lambda: request.finished and bad.status == "failed")
    assert losses(good) == want and request.output().outputs[0].token_ids == tokens
    assert "not finite" in bad.error and 0 < bad.step < 50
    with pytest.raises(JobError, match="not finite"):
        bad.wait()
    engine.wait(lambda: not engine.loop.training.device_jobs)
    assert engine.loop.training.grad_pool.num_free == engine.cfg.train_pages
    again = engine.finetune("bad", random_data(8), train=train(), replace=True).wait()
    assert losses(again) == want, "its pages are clean for whoever comes next"


@pytest.mark.parametrize("steps", [1, 2])
def test_a_job_whose_last_step_diverges_publishes_nothing(engine: Engine, steps: int):
    """Its losses are those before the last update: it succeeded, and served what no forward could take."""
    settings = {"learning_rate": 1e30, "warmup_steps": steps - 1, "max_steps": steps}
    job = engine.finetune("job", random_data(9), train=train(**settings))
    with pytest.raises(JobError, match=f"step {steps - 1}: loss .* norm of the new weights inf: not finite"):
        job.wait()
    assert job.status == "failed" and "job" not in engine.adapters
    assert len(losses(job)) == steps - 1
    with pytest.raises(AdapterError, match=f"adapter 'job': its job failed: step {steps - 1}: loss"):
        engine.log_probs([[5, 6, 7]], "job")


def test_jobs_wait_for_pages_of_the_gradient_pool(engine: Engine):
    """Five pages: five jobs of one fit at once, the others wait their turn."""
    jobs = [
        engine.finetune(f"job-{i}", random_data(i), lora=LoraConfig(r=8), train=train(max_steps=2)) for i in range(8)
    ]
    most = 0
    while engine.loop.training.device_jobs:
        engine.step() or engine.compiler.wait()
        most = max(most, sum(job.status == "running" for job in jobs))
    assert most == 5 and [job.status for job in jobs] == ["succeeded"] * 8


def test_what_is_wrong_is_said_before_anything_trains(engine: Engine, tmp_path: Path, datasets: Callable[..., Dataset]):
    add_random_adapter(engine, "a", 9, 8)
    broken = tmp_path / "data.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": \n')
    calls: tuple[tuple[type[Exception], str, Callable[[], Any]], ...] = (
        (DataError, r"data\.jsonl:2", lambda: engine.finetune("x", broken)),
        (DataError, "no such file", lambda: engine.finetune("x", tmp_path / "nothing.jsonl")),
        (AdapterError, "'a' exists", lambda: engine.finetune("a", datasets(0), train=train())),
        (AdapterError, "rank 112", lambda: engine.finetune("x", datasets(0), lora=LoraConfig(r=112), train=train())),
        (AdapterError, "nobody", lambda: engine.finetune("x", datasets(0), init_from="nobody", train=train())),
        (ConfigError, "pack_tokens", lambda: train(pack_tokens=100)),
    )
    for error, message, call in calls:
        with pytest.raises(error, match=message):
            call()
    assert not engine.jobs and engine.adapters.names() == ["a"]


def test_replacing_an_adapter_by_a_job(engine: Engine):
    """With `replace` the old version serves until something is published; every published one serves at once."""
    add_random_adapter(engine, "a", 10, 8)
    old = engine.generate([[5, 6]], "a", greedy(6))[0]
    job = engine.finetune("a", random_data(11), lora=LoraConfig(r=12), train=train(max_steps=30), replace=True)
    engine.wait(lambda: job.step >= 1)
    assert engine.generate([[5, 6]], "a", greedy(6))[0].outputs[0].token_ids == old.outputs[0].token_ids
    published = job.publish()
    assert job.publish() is published, "nothing has changed in between"
    new = engine.generate([[5, 6]], "a", greedy(6))[0]
    assert new.version == published.id > old.version
    job.wait()
    last = engine.generate([[5, 6]], "a", greedy(6))[0]
    assert last.version > published.id
    logp = engine.log_probs([[5, 6, 7, 8]], "a")[0]
    assert np.isfinite(logp).all() and logp.dtype == np.float32
