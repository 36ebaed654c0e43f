"""How a job ends and goes on: the best weights, a failed one's name, more steps, another day, a loss of one's own."""

import copy
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loquetier_jax.adapters.lora import LoraConfig
from loquetier_jax.adapters.peft import read_peft
from loquetier_jax.errors import AdapterError, CheckpointError, ConfigError, DataError, JobError
from tests.engine.engines import PACK, SPEC, add_random_adapter, base_params, greedy, random_data
from tests.engine.evidence import LORA, quick

DATED = "{% for m in messages %}{{ m.role }} {{ strftime_now('%f') }} {{ m.content }}{% endfor %}"
CHATS = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": c}]} for c in "bcde"]


def losses(job: Any, key: str = "loss") -> list[float]:
    return [line[key] for line in job.metrics if key in line]


def mean_loss(engine: Any, data: Any, adapter: str) -> float:
    """Cross-entropy of the learnt tokens, from what the adapter serves."""
    logps = engine.log_probs([[*s.tokens.tolist(), int(s.targets[-1])] for s in data.samples], adapter)
    total = sum(float((lp * s.weights).sum(dtype=np.float64)) for lp, s in zip(logps, data.samples, strict=True))
    return -total / data.num_targets


WORSE = {"max_steps": 40, "learning_rate": 0.05, "lr_scheduler_type": "constant", "eval_steps": 1}


@pytest.mark.parametrize("moved", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_early_stopping_serves_and_saves_the_best(tiny_engine, tmp_path, moved):
    """The last, worst weights were served and saved; a checkpoint in between carries the best along."""
    data, held_out = random_data(4, count=6), random_data(5, count=4)
    job = tiny_engine.finetune(
        "job", data, lora=LORA, eval_data=held_out, train=quick(**WORSE, early_stopping_patience=3)
    )
    evals = []
    if moved:
        tiny_engine.wait(lambda: job.step >= 1 and job.best_step is not None and job.best_step < job.step)
        path = job.checkpoint(tmp_path / "checkpoint")
        evals = losses(job, "eval_loss")
        job.cancel()
        job = tiny_engine.resume_job(path, data, eval_data=held_out)
    evals += losses(job.wait(), "eval_loss")
    assert job.status == "succeeded" and job.serves_best
    assert job.best_step == 1 + int(np.argmin(evals)) < job.step == len(evals)
    served = mean_loss(tiny_engine, held_out, "job")
    assert served == pytest.approx(min(evals), rel=1e-5) and served < evals[-1] - 0.1
    weights = tiny_engine.adapters.weights(tiny_engine.adapters.get("job"))
    saved = read_peft(job.save(tmp_path / "adapter"), tiny_engine.spec).weights
    jax.tree.map(np.testing.assert_array_equal, saved, weights)
    tiny_engine.check_integrity()


def test_a_checkpoint_during_the_best_evaluation_keeps_its_weights(tiny_engine, tmp_path):
    """The job was paused just then: best_step moved on, the weights of an earlier step were kept as the best."""
    data, held_out = random_data(4, count=6), random_data(5, count=4)
    cfg = quick(**WORSE, early_stopping_patience=3)
    job = tiny_engine.finetune("job", data, lora=LORA, eval_data=held_out, train=cfg)
    inner = job.device_job.job
    tiny_engine.wait(lambda: job.step == 2 and inner.evaluation.in_flight > 0)
    job.checkpoint(tmp_path)
    evals = losses(job.wait(), "eval_loss")
    assert job.serves_best and job.best_step == 2 == 1 + int(np.argmin(evals))
    assert mean_loss(tiny_engine, held_out, "job") == pytest.approx(min(evals), rel=1e-5)


@pytest.mark.slow  # each half of it: tests/train/test_job.py
def test_a_run_that_was_stopped_early_goes_on(tiny_engine, tmp_path):
    """Its newest checkpoint was of before the last evaluation, which stopped it again at once."""
    data, held_out = random_data(4, count=6), random_data(5, count=4)
    cfg = quick(**WORSE, early_stopping_patience=2, save_steps=1, output_dir=str(tmp_path))
    job = tiny_engine.finetune("job", data, lora=LORA, eval_data=held_out, train=cfg).wait()
    assert job.step < job.total_steps
    more = tiny_engine.resume_job(tmp_path, data, eval_data=held_out, train={"max_steps": 60}).wait()
    assert more.step == job.step + 2, "as patient as before"


def test_the_last_weights_serve_where_one_asks_for_them(tiny_engine):
    data, held_out = random_data(4, count=6), random_data(5, count=4)
    cfg = quick(**WORSE, early_stopping_patience=2, load_best_model_at_end=False)
    job = tiny_engine.finetune("job", data, lora=LORA, eval_data=held_out, train=cfg).wait()
    assert not job.serves_best and job.best_step < job.step
    assert mean_loss(tiny_engine, held_out, "job") == pytest.approx(losses(job, "eval_loss")[-1], rel=1e-5)
    with pytest.raises(ConfigError, match="load_best_model_at_end: got True, expected False without eval_data"):
        tiny_engine.finetune("other", data, lora=LORA, train=quick(load_best_model_at_end=True))


def test_a_failed_job_leaves_no_adapter_behind(tiny_engine):
    """Its name was taken, and an adapter that nobody had trained answered under it as if it were the result."""
    engine, bad = tiny_engine, {"learning_rate": 1e30, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    with pytest.raises(JobError, match="not finite"):
        engine.finetune("job", random_data(0), lora=LORA, train=quick(**bad)).wait()
    [output] = engine.generate([[5, 6, 7]], "job", greedy(4))
    assert output.outputs[0].finish_reason == "error"
    assert output.outputs[0].stop_reason.startswith("adapter 'job': its job failed: step 0: loss")
    for call in (engine.log_probs, lambda ids, name: engine.finetune("x", random_data(0), init_from=name)):
        with pytest.raises(AdapterError, match="its job failed"):
            call([[5, 6, 7]], "job")
    assert "job" not in engine.adapters and engine.adapters.names() == []
    engine.check_integrity()
    assert engine.finetune("job", random_data(0), lora=LORA, train=quick()).wait().status == "succeeded"
    assert engine.adapters.names() == ["job"]
    assert engine.generate([[5, 6, 7]], "job", greedy(4))[0].outputs[0].finish_reason == "length"


def test_what_was_there_or_published_stays_when_a_job_ends(tiny_engine):
    engine, bad = tiny_engine, {"learning_rate": 1e30, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    add_random_adapter(engine, "old", 1)
    before = engine.adapters.get("old")
    with pytest.raises(JobError):
        engine.finetune("old", random_data(0), lora=LORA, train=quick(**bad), replace=True).wait()
    assert engine.adapters.get("old") is before
    job = engine.finetune("new", random_data(0), lora=LORA, train=quick(max_steps=50))
    engine.wait(lambda: job.step >= 1)
    published = job.publish()
    job.cancel()
    engine.wait(lambda: job.released)
    assert engine.adapters.get("new") is published
    never = engine.finetune("never", random_data(0), lora=LORA, train=quick(max_steps=50))
    engine.rename_adapter("never", "kept")
    gone = engine.finetune("gone", random_data(0), lora=LORA, train=quick(max_steps=50))
    for job in (never, gone):
        job.cancel()
        engine.wait(lambda job=job: job.released)
    assert engine.adapters.names() == ["kept", "new", "old"], "whoever gave it another name wanted it"
    assert engine.generate([[5]], "gone", greedy(1))[0].outputs[0].stop_reason.endswith("it has published nothing")
    engine.rename_adapter("kept", "gone")
    engine.check_integrity()
    assert engine.generate([[5]], "gone", greedy(1))[0].outputs[0].finish_reason == "length"


def test_a_finished_run_goes_on_for_more_steps(tiny_engine, tmp_path):
    """With its moments and the longer schedule: at a constant rate it is the longer run, number for number."""
    data, steady = random_data(0), {"lr_scheduler_type": "constant", "output_dir": str(tmp_path / "run")}
    long = tiny_engine.finetune("long", data, lora=LORA, train=quick(max_steps=4, lr_scheduler_type="constant")).wait()
    first = tiny_engine.finetune("short", data, lora=LORA, train=quick(max_steps=2, save_steps=2, **steady)).wait()
    more = tiny_engine.resume_job(tmp_path / "run", data, train={"max_steps": 4}).wait()
    assert losses(first) + losses(more) == losses(long)
    linear = tiny_engine.resume_job(tmp_path / "run", data, train={"max_steps": 8, "lr_scheduler_type": "linear"})
    assert losses(linear.wait(), "learning_rate") == [float(np.float32(1e-3 * (8 - i) / 8)) for i in range(4, 8)]
    with pytest.raises(ConfigError, match="max_steps: got 8, expected more than the 8 that are done"):
        tiny_engine.resume_job(tmp_path / "run", data, train={"max_steps": 8})
    with pytest.raises(ConfigError, match="eval_steps: got 1, expected 0 without eval_data"):
        tiny_engine.resume_job(tmp_path / "run", data, train={"max_steps": 9, "eval_steps": 1})
    with pytest.raises(ConfigError, match="train optim: got 'sgd', expected one of"):
        tiny_engine.resume_job(tmp_path / "run", data, train={"optim": "sgd"})


def test_a_template_that_prints_the_time_resumes_at_any(tiny_engine, tmp_path, monkeypatch):
    """Its samples have the time at which the job was started; the next microsecond they were other data."""
    dated = copy.deepcopy(tiny_engine.tokenizer)
    dated.chat_template = DATED
    monkeypatch.setattr(tiny_engine.job_manager, "tokenizer", dated)
    cfg = quick(max_steps=50, per_device_train_batch_size=4)
    job = tiny_engine.finetune("job", CHATS, lora=LORA, eval_data=CHATS[:1], train=cfg)
    path = job.checkpoint(tmp_path)
    samples = job.device_job.job.stream.data.samples
    job.cancel()
    again = tiny_engine.resume_job(path, CHATS, eval_data=CHATS[:1])
    for one, other in zip(again.device_job.job.stream.data.samples, samples, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
    again.cancel()
    dated.chat_template = DATED.replace("%f", "%f %Y")
    with pytest.raises(CheckpointError, match="data: the records match, but this tokenizer gives different tokens"):
        tiny_engine.resume_job(path, CHATS, eval_data=CHATS[:1])
    with pytest.raises(CheckpointError, match=r"data: got hash .* not the data of the job"):
        tiny_engine.resume_job(path, CHATS[::-1], eval_data=CHATS[:1])


def test_a_loss_in_ordinary_jax_over_pairs(tiny_engine):
    """It was called once more, with numpy, and failed the job after its backward; extras come by name."""
    base = random_data(2, count=8, low=20, high=30)
    logps = tiny_engine.log_probs([[*s.tokens.tolist(), int(s.targets[-1])] for s in base.samples])
    rows = zip(range(8), base.samples, logps, strict=True)
    samples = [replace(sample, extras={"ref": lp, "no": np.float32(i)}) for i, sample, lp in rows]
    data, seen = replace(base, samples=tuple(samples), group_size=2), []

    def dpo(logp: Any, weights: Any, batch: Any) -> Any:
        seen.extend(isinstance(a, jax.Array) for a in (logp, weights, *jax.tree.leaves(batch)))
        gain = batch.sum_by_sample(weights.at[0].multiply(1.0) * (logp - batch.extras["ref"]))
        whole = batch.extras["no"][0::2] + 1 - batch.extras["no"][1::2]  # 0 where the two were neighbours
        return jnp.where(batch.sample_mask[0::2], -jax.nn.log_sigmoid(gain[0::2] - gain[1::2]) + whole, 0).sum()

    cfg = quick(loss=dpo, loss_per="group", learning_rate=1e-2)
    job = tiny_engine.finetune("job", data, eval_data=data, lora=LORA, train=cfg).wait()
    assert losses(job)[0] == pytest.approx(np.log(2), rel=1e-5), "an adapter that changes nothing"
    assert losses(job, "eval_loss")[0] < losses(job)[0]
    assert len(seen) >= 2 * 7 and all(seen)
    with pytest.raises(DataError, match="cross-entropy does not use extras"):
        tiny_engine.finetune("other", data, lora=LORA, train=quick())


@pytest.fixture(scope="module")
def broken_base(make_engine):
    params = dict(base_params(SPEC))
    params["norm"] = params["norm"].at[0].set(jnp.nan)
    return make_engine(params=params)


@pytest.mark.slow
def test_nan_of_the_base_is_not_blamed_on_an_adapter(broken_base, tiny_engine):
    """Every request was told that its adapter's weights were not finite, those without one, too."""
    engine = broken_base
    for name, value in (("fine", 1.0), ("sick", np.nan)):
        add_random_adapter(engine, name, 1)
        version = engine.adapters.get(name)
        weights = jax.tree.map(lambda a, value=value: a * np.float32(value), engine.adapters.weights(version))
        engine.add_adapter(name, weights, version.shape, replace=True)
    outputs = engine.generate([[5, 6, 7]] * 3, [None, "fine", "sick"], greedy(4))
    base, fine, sick = (o.outputs[0].stop_reason for o in outputs)
    assert base.startswith("the base model gave NaN: its weights are not finite")
    assert "the weights of adapter 'fine' are finite; those of the base model are not" in fine
    assert sick == "the model gave NaN: the weights of adapter 'sick' are not finite"
    with pytest.raises(JobError, match=r"step 0: .* the base model's own log-probs of these tokens are not finite"):
        engine.finetune("job", random_data(0), lora=LoraConfig(r=4), train=quick(pack_tokens=PACK)).wait()
