"""What a new user broke: each test is one bug that was there."""

import shutil
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from loquetier_jax.adapters.lora import LoraConfig
from loquetier_jax.config import Bucket
from loquetier_jax.errors import AdapterError, ConfigError, DataError, EngineError, JobError, RequestError
from loquetier_jax.sampling_params import SamplingParams
from tests.engine.engines import PACK, SERVE, add_random_adapter, greedy, random_data, reset
from tests.engine.evidence import LORA, quick


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_k", 2**40), ("max_tokens", 2**31), ("temperature", 1e39), ("repetition_penalty", 10**400)],
)
def test_numbers_beyond_the_devices_are_refused(name, value):
    """top_k = 2**40 was accepted, and then every step of everybody raised OverflowError."""
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})
    with pytest.raises(RequestError, match="logit_bias"):
        SamplingParams(logit_bias={3: 1e39})


def test_next_to_no_temperature_is_greedy():
    """Logits divided by 2e-38 are infinite: the first of all likely tokens won."""
    assert SamplingParams(temperature=2e-38).level == "greedy"


def test_params_of_another_type_are_refused(tiny_engine):
    with pytest.raises(RequestError, match="params: got"):
        tiny_engine.submit([3, 4], params={"max_tokens": 4})
    assert not tiny_engine.loop.serving.waiting


def test_log_probs_of_one_text_is_one_sequence(tiny_engine):
    """A text was taken for a list of its characters."""
    [one], [other] = tiny_engine.log_probs("abc"), tiny_engine.log_probs(["abc"])
    np.testing.assert_array_equal(one, other)


def test_a_request_that_only_a_job_could_carry_is_refused(tiny_engine, monkeypatch):
    """Without one there is no step that prefills, or none that decodes: it waited for ever."""
    for rows in ({"prefill": 48, "chunks": 3}, {"decode": 16}):
        buckets = (Bucket(**rows), Bucket(**SERVE, packs=1, pack_tokens=PACK))
        monkeypatch.setattr(tiny_engine.requests, "cfg", replace(tiny_engine.cfg, buckets=buckets))
        with pytest.raises(RequestError, match=r"buckets: got .* expected prefill and decode rows"):
            tiny_engine.submit([3, 4])


@pytest.fixture(scope="module")
def small_engine(make_engine):
    """One adapter page, one train page, score buckets of two lengths."""
    buckets = (Bucket(**SERVE), Bucket(score_packs=2, score_tokens=PACK), Bucket(score_packs=1, score_tokens=2 * PACK))
    return make_engine(max_adapters=1, train_pages=1, max_lora_rank=16, buckets=buckets)


@pytest.fixture
def small(small_engine):
    reset(small_engine)
    yield small_engine
    reset(small_engine)


@pytest.mark.slow  # a world of its own
def test_scoring_without_room_lets_an_evaluation_pass(small):
    """The only page is a job's, whose evaluation was queued behind the scores that wait for the page."""
    engine = small
    add_random_adapter(engine, "other", 1)
    job = engine.finetune("job", random_data(0), lora=LORA, train=quick(), eval_data=random_data(1))
    engine.wait(lambda: job.status == "running")
    scores = []
    engine.loop.scoring.add(engine.scores.task([[5, 6, 7]], "other", scores.extend, pytest.fail))
    job.wait()
    assert "eval_loss" in job.metrics[-1]
    engine.wait(lambda: bool(scores))
    np.testing.assert_array_equal(scores[0]["logp"], engine.log_probs([[5, 6, 7]], "other")[0])
    engine.check_integrity()


@pytest.mark.slow  # a world of its own
def test_scores_of_two_lengths_meet_in_the_bucket_of_the_shorter(small):
    """Packs were taken in order of arrival, whether or not they fit the bucket chosen for those that do."""
    done = []
    tasks = [small.scores.task([list(range(3, 3 + n))], None, done.append, pytest.fail) for n in (20, 100, 20)]
    for task in (tasks[0], tasks[2]):
        task.packs[0] = _cut(task.packs[0])
    for task in tasks:
        small.loop.scoring.add(task)
    small.wait(lambda: len(done) == 3)
    assert sorted(len(scores[0]["logp"]) for scores in done) == [19, 19, 99]


def _cut(pack):
    rows = ("tokens", "targets", "positions", "segments", "weights", "drop_keys")
    return type(pack)(**vars(pack) | {name: getattr(pack, name)[:PACK] for name in rows})


@pytest.mark.slow  # a world of its own
def test_a_job_that_could_never_go_on_is_refused(small, tiny_engine, tmp_path):
    """Evaluation packs longer than any score bucket, and jobs resumed where there is no room, waited for ever."""
    with pytest.raises(JobError, match=f"eval_data: got pack_tokens {4 * PACK}"):
        tiny_engine.finetune("job", random_data(0), train=quick(pack_tokens=4 * PACK), eval_data=random_data(1))
    assert "job" not in tiny_engine.adapters
    wide = tiny_engine.finetune("wide", random_data(0), lora=LoraConfig(r=32), train=quick())
    wide.checkpoint(tmp_path)
    with pytest.raises(AdapterError, match="rank 32"):
        small.resume_job(tmp_path, random_data(0))
    assert "wide" not in small.adapters and not small.loop.training.device_jobs


def test_publish_serves_the_name_whatever_became_of_it(tiny_engine):
    """A second publish without a step in between returned the version that nobody's name pointed to any more."""
    job = tiny_engine.finetune("job", random_data(0), lora=LORA, train=quick())
    tiny_engine.wait(lambda: job.step >= 1)
    job.pause()
    tiny_engine.drain()
    job.publish()
    want = tiny_engine.generate([[5, 6, 7]], "job", greedy(4))[0].outputs[0].token_ids
    tiny_engine.rename_adapter("job", "kept")
    job.publish()
    assert tiny_engine.adapters.names() == ["job", "kept"]
    tiny_engine.unload_adapter("job")
    job.publish()
    for name in ("job", "kept"):
        assert tiny_engine.generate([[5, 6, 7]], name, greedy(4))[0].outputs[0].token_ids == want
    tiny_engine.check_integrity()
    job.resume()
    job.wait()
    tiny_engine.check_integrity()


def test_files_of_a_job_fail_that_job_alone(tiny_engine, tmp_path):
    """A folder removed under a job raised out of the loop: in whoever drove it, or ending its thread."""
    out = tmp_path / "run"
    job = tiny_engine.finetune("job", random_data(0), lora=LORA, train=quick(max_steps=50, output_dir=str(out)))
    tiny_engine.wait(lambda: job.step >= 1)
    shutil.rmtree(out)
    [output] = tiny_engine.generate([[5, 6, 7]], params=greedy(60))
    assert len(output.outputs[0].token_ids) == 60
    with pytest.raises(JobError, match="FileNotFoundError"):
        job.wait()
    tiny_engine.check_integrity()


@pytest.mark.parametrize("threaded", [False, True])
def test_a_failed_step_ends_everything_with_its_error(make_engine, monkeypatch, threaded):
    """They waited for ever, and the engine went on with buffers that nobody could vouch for."""
    engine, pieces = make_engine(), []
    waiting = engine.submit([5, 6, 7], params=greedy(4), listener=pieces.append)
    job = engine.finetune("job", random_data(0), lora=LORA, train=quick())
    monkeypatch.setattr(engine.loop, "iterate", lambda: 1 / 0)
    if threaded:
        engine.start()
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        engine.generate([[5, 6, 7]], params=greedy(4))
    engine.stop()
    assert pieces[-1].finish_reason == waiting.requests[0].finish_reason == "error"
    assert "ZeroDivisionError" in waiting.requests[0].stop_reason
    assert job.status == "failed" and "ZeroDivisionError" in job.error
    for call in (engine.step, lambda: engine.submit([5]), lambda: engine.finetune("new", random_data(0))):
        with pytest.raises(EngineError, match="a step has failed"):
            call()


def test_ctrl_c_falls_between_two_steps(tiny_engine, monkeypatch):
    """Inside one it could fall after the buffers were given away and before the new ones were kept."""
    engine, iterate, steps = tiny_engine, tiny_engine.loop.iterate, []

    def interrupted() -> bool:
        signal.raise_signal(signal.SIGINT)
        steps.append(iterate())
        return steps[-1]

    monkeypatch.setattr(engine.loop, "iterate", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # test workers ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            engine.generate([[5, 6, 7]], params=greedy(4))
    finally:
        signal.signal(signal.SIGINT, before)
    assert steps == [True]  # the step it fell into was finished
    monkeypatch.undo()
    assert len(engine.generate([[5, 6, 7]], params=greedy(4))[0].outputs[0].token_ids) == 4


def test_submit_gets_the_lock_beside_a_busy_thread(tiny_engine):
    """The thread took the lock again before anybody else could: a submit could wait for many steps."""
    job = tiny_engine.finetune("job", random_data(0, 100), lora=LORA, train=quick(max_steps=10**6))
    tiny_engine.wait(lambda: job.step >= 1)
    tiny_engine.start()
    try:
        waits = []
        for _ in range(20):
            start, step = time.perf_counter(), job.step
            submitted = tiny_engine.submit([5, 6, 7], params=greedy(2))
            waits.append((job.step - step, time.perf_counter() - start))
        threads = [threading.Thread(target=tiny_engine.generate, args=([[5, 6]],)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        tiny_engine.wait(lambda: submitted.finished)
    finally:
        job.cancel()
        tiny_engine.stop()
    assert np.median([steps for steps, _ in waits]) <= 2


@pytest.mark.slow  # a world of its own
def test_a_request_without_adapter_passes_one_that_waits_for_a_page(small):
    """Sixteen did; then all waited until the job that had the page was over."""
    add_random_adapter(small, "other", 1)
    job = small.finetune("job", random_data(0), lora=LORA, train=quick(max_steps=10**6))
    small.wait(lambda: job.step >= 1)
    waiting = small.submit([5, 6, 7], "other", greedy(2))
    assert len(small.generate([[5, 6, 7]] * 40, params=greedy(2))) == 40
    assert not waiting.finished
    job.cancel()
    small.wait(lambda: waiting.finished)
    small.check_integrity()


def test_stream_refuses_at_once(tiny_engine):
    """It did at the first piece only, and two streams ran one after the other."""
    with pytest.raises(AdapterError, match="nobody"):
        tiny_engine.stream([5, 6, 7], "nobody")
    one, other = (tiny_engine.stream([5, 6, n], params=greedy(4)) for n in (7, 8))
    assert len(tiny_engine.loop.serving.waiting) == 2
    assert sum(len(p.token_ids) for p in one) == sum(len(p.token_ids) for p in other) == 4


def test_ids_of_callers_do_not_meet_those_of_the_engine(tiny_engine):
    number = int(tiny_engine.submit([5, 6, 7]).request_id.removeprefix("request-"))
    tiny_engine.submit([5, 6, 7], request_id=f"request-{number + 1}")
    assert tiny_engine.submit([5, 6, 7]).request_id == f"request-{number + 2}"


def test_nothing_is_left_of_a_generate_that_was_interrupted(tiny_engine, monkeypatch):
    """Its requests stayed, and later calls ran them to their end."""
    real, calls = tiny_engine.step, []

    def step():
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real()

    monkeypatch.setattr(tiny_engine.driver, "step", step)
    with pytest.raises(KeyboardInterrupt):
        tiny_engine.generate([[5, 6, 7]] * 20, params=greedy(50))
    assert not tiny_engine.loop.serving.running and not tiny_engine.loop.serving.waiting
    tiny_engine.check_integrity()


def test_data_that_cannot_be_used_is_refused(small, tiny_engine, tmp_path):
    for settings in ({"train": {"max_steps": 3}}, {"lora": {"r": 8}}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            tiny_engine.finetune("job", random_data(0), **settings)
    with pytest.raises(DataError, match="no tokenizer"):
        small.finetune("job", [{"text": "some text"}], train=quick())
    out = str(tmp_path / "run")
    tiny_engine.finetune("job", random_data(0), lora=LORA, train=quick(output_dir=out))
    with pytest.raises(JobError, match="is in use by job 'job'"):
        tiny_engine.finetune("other", random_data(0), lora=LORA, train=quick(output_dir=out + "/"))
    assert "other" not in tiny_engine.adapters
