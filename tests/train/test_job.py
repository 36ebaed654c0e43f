"""The job's state machine, driven by a stand-in for the engine; what it reports; resuming it anywhere."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from loquetier_jax.errors import CheckpointError, ConfigError, JobError
from loquetier_jax.train.changes import changed_config
from loquetier_jax.train.config import TrainConfig
from loquetier_jax.train.job import Job
from loquetier_jax.train.metrics import MetricsWriter, read_metrics
from loquetier_jax.train.restore import restore_job

CONFIG = {
    "pack_tokens": 64,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
}
LENGTHS = [20, 64, 33, 5, 40, 60, 12, 50]


def score(pack, step=0):
    """Log-probs and hits that depend on what is scored alone; rows without a target hold rubbish."""
    logp = -np.float32(0.1) * (1 + pack.targets % 7) / np.float32(1 + step)
    return np.where(pack.weights > 0, logp, np.nan).astype(np.float32), pack.targets % 2 == 0


def drive(job, actions, eval_score=score):
    """Up to `actions` single moves of the engine; returns how many were made."""
    for count in range(actions):
        if job.step_due:
            job.finish_step(grad_norm=1.0 + job.step, learning_rate=1e-3, weight_norm=1.0)
        elif (pack := job.next_eval_pack()) is not None:
            job.eval_pack_dispatched(pack)
            job.eval_pack_finished(pack, *eval_score(pack, job.step))
        elif (pack := job.next_pack()) is not None:
            job.pack_dispatched(pack)
            job.pack_finished(pack, *score(pack, job.step))
        else:
            return count
    return actions


def started(data, eval_data=None, **config):
    job = Job("math", TrainConfig(**(CONFIG | config)), data, eval_data, clock=lambda: 0.0)
    job.start()
    return job


def test_a_whole_job(make_data):
    data = make_data(LENGTHS)
    job = started(data)
    drive(job, 1000)
    assert job.status == "succeeded"
    assert job.step == job.total_steps == 4
    assert [line["step"] for line in job.record.lines] == [1, 2, 3, 4]
    assert [line["epoch"] for line in job.record.lines] == [0.75, 1.0, 1.75, 2.0]
    first = [data.samples[i] for i in job.stream.samples_of(0)]
    targets = np.concatenate([s.targets for s in first])
    logp = (-np.float32(0.1) * (1 + targets % 7)).astype(np.float32)
    line = job.record.lines[0]
    assert line["loss"] == -math.fsum(map(float, logp)) / len(targets)
    assert line["mean_token_accuracy"] == np.mean(targets % 2 == 0)
    assert line["num_tokens"] == len(targets)
    assert (line["grad_norm"], line["learning_rate"]) == (1.0, 1e-3)
    assert job.record.lines[-1]["num_tokens"] == 2 * sum(LENGTHS)


def test_logging_steps_reports_the_mean(make_data):
    every = started(make_data(LENGTHS))
    thirds = started(make_data(LENGTHS), logging_steps=3)
    drive(every, 1000)
    drive(thirds, 1000)
    losses = [line["loss"] for line in every.record.lines]
    assert [(x["step"], x["loss"]) for x in thirds.record.lines] == [
        (3, math.fsum(losses[:3]) / 3),
        (4, losses[3]),
    ]


@pytest.mark.parametrize(("loss_per", "count"), [("target", 284), ("sample", 8), ("group", 4)])
def test_the_sum_of_a_loss_of_ones_own_is_divided_by_what_is_asked_for(make_data, loss_per, count):
    """It comes from the device: the function itself is never called here, with numpy."""
    data = replace(make_data(LENGTHS), group_size=2)
    config = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "pack_tokens": 128, "max_steps": 1}
    job = started(data, **config, loss=lambda logp, weights: 1 / 0, loss_per=loss_per)
    packs = []
    while (pack := job.next_pack()) is not None:
        job.pack_dispatched(pack)
        packs.append(pack)
    assert job.denominator_dispatched == count
    for number, pack in enumerate(packs):
        job.pack_finished(pack, *score(pack), loss=number + 0.5)
    job.finish_step(1.0, 1e-3, 1.0)
    assert job.record.lines[0]["loss"] == len(packs) ** 2 / 2 / count


@pytest.mark.parametrize("moves", range(24))
def test_resume_anywhere_is_exact(make_data, tmp_path, moves):
    """A job cut anywhere, mid-accumulation or mid-evaluation, writes the same file as one never cut."""
    data, held_out = make_data(LENGTHS), make_data([30, 30, 60], name="eval")

    def run(name, cut=None):
        cfg = TrainConfig(**CONFIG, eval_steps=2, logging_steps=2)
        job = Job(name, cfg, data, held_out, metrics=MetricsWriter(tmp_path / name), clock=lambda: 0.0)
        job.start()
        if cut is not None:
            drive(job, cut)
            state = json.loads(json.dumps(job.state_dict()))
            drive(job, 5)  # goes on after the checkpoint, and is then killed
            again = MetricsWriter(tmp_path / name)
            job = restore_job(state, data, held_out, metrics=again, clock=lambda: 0.0)
        drive(job, 1000)
        assert job.status == "succeeded"
        return read_metrics(tmp_path / name)

    assert run("cut", moves) == run("whole")


def test_several_packs_in_flight(make_data):
    job = started(make_data(LENGTHS))
    packs = []
    while (pack := job.next_pack()) is not None:
        assert job.next_pack() is pack
        job.pack_dispatched(pack)
        packs.append(pack)
    assert len(packs) == job.stream.packs_in_step(0) > 2 and packs[-1].is_last
    assert not job.step_due and job.in_flight == len(packs)
    with pytest.raises(JobError, match="in flight"):
        job.state_dict()
    with pytest.raises(JobError, match="not the oldest"):
        job.pack_finished(packs[1], *score(packs[1]))
    with pytest.raises(JobError, match="no optimizer step is due"):
        job.finish_step(1.0, 1e-3, 1.0)
    for pack in packs:
        job.pack_finished(pack, *score(pack))
    assert job.step_due and job.denominator_dispatched == sum(p.num_targets for p in packs)
    with pytest.raises(JobError, match="not the next one"):
        job.pack_dispatched(packs[0])


def test_pause_resume_cancel(make_data):
    job = Job("math", TrainConfig(**CONFIG), make_data(LENGTHS))
    assert job.next_pack() is None
    job.pause()
    job.resume()
    assert job.status == "queued"
    job.start()
    pack = job.next_pack()
    job.pack_dispatched(pack)
    job.pause()
    assert job.next_pack() is None and not job.step_due
    job.pack_finished(pack, *score(pack))  # what was dispatched still counts
    assert job.in_flight == 0
    with pytest.raises(JobError, match="cannot start: it is paused"):
        job.start()
    job.resume()
    second = job.next_pack()
    assert second.index == 1
    job.pack_dispatched(second)
    job.cancel()
    job.pack_finished(second, *score(second))  # dropped
    assert (job.status, job.in_flight, job.next_pack()) == ("cancelled", 0, None)
    for move in (job.resume, job.pause, job.cancel, job.start):
        with pytest.raises(JobError, match="it is cancelled"):
            move()


@pytest.mark.parametrize("grad_norm, weight_norm, bad", [*np.where(np.eye(3), np.nan, 1.0), (1.0, 1.0, np.inf)])
def test_what_is_not_finite_fails_the_job(make_data, grad_norm, weight_norm, bad):
    job = started(make_data([10]))
    pack = job.next_pack()
    job.pack_dispatched(pack)
    job.pack_finished(pack, score(pack)[0] + np.float32(bad))
    job.finish_step(grad_norm, 1e-3, weight_norm)
    assert job.status == "failed" and "not finite" in job.error
    assert job.step == 0 and job.record.lines == []


@pytest.mark.parametrize(
    ("losses", "threshold", "stops_at"),
    [([3, 2, 1, 1, 1], 0.0, None), ([3, 3, 3, 1, 1], 0.0, 3), ([3, 2.75, 2.5, 1, 1], 0.5, 3)],
)
def test_early_stopping(make_data, losses, threshold, stops_at):
    job = started(
        make_data([8] * 6), make_data([8], "eval"), max_steps=5, eval_steps=1, early_stopping_patience=2,
        early_stopping_threshold=threshold,
    )  # fmt: skip
    drive(job, 1000, lambda pack, step: (np.full(64, -losses[step - 1], np.float32), None))
    evals = [line["eval_loss"] for line in job.record.lines if "eval_loss" in line]
    assert job.status == "succeeded"
    assert evals == losses[: stops_at or 5]
    assert job.best_step == 1 + evals.index(min(evals))


@pytest.mark.parametrize("untrained", [True, False])
def test_whose_nan_it_is(make_data, untrained):
    """Before anything was trained it is the base model's; of finite log-probs it is the loss function's."""

    def failed(logp, loss=None):
        job = Job("math", TrainConfig(**CONFIG), make_data([10]), untrained=untrained)
        job.start()
        pack = job.next_pack()
        job.pack_dispatched(pack)
        job.pack_finished(pack, np.full(64, logp, np.float32), None, loss)
        job.finish_step(1.0, 1e-3, 1.0)
        return job.error

    assert ("the base model's own log-probs" in failed(np.nan)) == untrained
    assert failed(-1.0, np.nan).endswith("the cause is the loss function")


def test_a_finished_job_goes_on(make_data):
    """With the same data, step by step what one of that length from the start does; and only forwards."""
    held_out = make_data([8], "eval")
    config = {"max_steps": 2, "eval_steps": 1, "early_stopping_patience": 1}
    job = started(make_data(LENGTHS), held_out, **config)
    drive(job, 1000)
    saved = json.loads(json.dumps(job.state_dict()))
    assert (job.status, job.step) == ("succeeded", 2)
    assert restore_job(saved, make_data(LENGTHS), held_out).status == "succeeded"
    saved["config"] = changed_config(saved["config"], {"max_steps": 4})
    longer = restore_job(saved, make_data(LENGTHS), held_out, go_on=True, clock=lambda: 0.0)
    whole = started(make_data(LENGTHS), held_out, **config | {"max_steps": 4})
    assert longer.status == "queued"
    longer.start()
    drive(longer, 1000)
    drive(whole, 1000)
    assert (longer.status, longer.step) == ("succeeded", 4)
    assert longer.record.lines == [line for line in whole.record.lines if line["step"] > 2]
    saved["config"] = changed_config(saved["config"], {"max_steps": 1})
    with pytest.raises(ConfigError, match="max_steps: got 1, expected more than the 2 that are done"):
        restore_job(saved, make_data(LENGTHS), held_out, go_on=True)
    for key, value in {"optim": "sgd", "seed": 1, "pack_tokens": 128, "nonsense": 1}.items():
        with pytest.raises(ConfigError, match=f"train {key}: got"):
            changed_config(saved["config"], {key: value})


def test_save_due(make_data):
    job = started(make_data(LENGTHS), save_steps=3, output_dir="unused")
    saved = []
    while drive(job, 1):
        if job.save_due:
            saved.append(job.step)
            job.saved(job.step)
    assert saved == [3, 4]


def test_a_checkpoint_waits_for_the_evaluation_of_its_step(make_data):
    job = started(make_data(LENGTHS), make_data([8], "eval"), save_steps=2, eval_steps=2, output_dir="unused")
    saved = []
    while drive(job, 1):
        if job.save_due:
            saved.append((job.step, len([line for line in job.record.lines if "eval_loss" in line])))
            job.saved(job.step)
    assert saved == [(2, 1), (4, 2)] and job.status == "succeeded"


def test_patience_begins_anew_for_a_job_that_goes_on(make_data):
    """Also from within the evaluation that was about to stop it."""
    data = make_data([8] * 6), make_data([8], "eval")
    job = started(*data, max_steps=9, eval_steps=1, early_stopping_patience=2)
    worse = lambda pack, step: (np.full(64, -float(step), np.float32), None)  # noqa: E731
    while not (job.step == 3 and job.evaluating):
        drive(job, 1, worse)
    again = restore_job(job.state_dict(), *data, go_on=True)
    assert (again.status, again.evaluating, again.evaluation.misses) == ("running", True, 0)
    drive(again, 1000, worse)
    assert again.step == 4


def test_other_data_is_refused(make_data):
    job = started(make_data(LENGTHS))
    with pytest.raises(CheckpointError, match="not the data of the job"):
        restore_job(job.state_dict(), make_data([1, *LENGTHS]))
    with pytest.raises(CheckpointError, match="eval_data"):
        restore_job(job.state_dict(), make_data(LENGTHS), make_data([3]))
    with pytest.raises(CheckpointError, match="eval_data: got data, expected None: the job has none"):
        restore_job(job.state_dict(), make_data(LENGTHS), make_data([3], "eval"))
    held_out = started(make_data(LENGTHS), make_data([3], "eval"))
    with pytest.raises(CheckpointError, match="eval_data: got None, expected the job's evaluation data"):
        restore_job(held_out.state_dict(), make_data(LENGTHS))
    records = started(replace(make_data(LENGTHS), records="those"))
    with pytest.raises(CheckpointError, match="the records match, but this tokenizer gives different tokens"):
        restore_job(records.state_dict(), replace(make_data([1, *LENGTHS]), records="those"))
    restore_job(records.state_dict(), replace(make_data(LENGTHS), records="others"))  # of the same tokens


def test_metrics_truncate(tmp_path):
    metrics = MetricsWriter(tmp_path / "run" / "metrics.jsonl")
    metrics.write({"step": 1})
    position = metrics.position()
    metrics.write({"step": 2})
    with pytest.raises(ValueError, match="JSON"):
        metrics.write({"loss": math.nan})
    metrics = MetricsWriter(metrics.path)
    assert metrics.position() > position
    metrics.truncate(position)
    metrics.write({"step": 3})
    with pytest.raises(CheckpointError, match="expected 1000 or more"):
        metrics.truncate(1000)
    assert read_metrics(metrics.path) == [{"step": 1}, {"step": 3}]
    with metrics.path.open("ab") as file:
        file.write(b'{"step": 4')
    assert len(read_metrics(metrics.path)) == 2
