"""What nobody means to do and somebody does: each test is one bug that was there."""

import re
import signal

import pytest

from loquetier_jax.adapters.residency import Residency
from loquetier_jax.config import Bucket, SLOConfig
from loquetier_jax.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    DataError,
    EngineError,
    JobError,
    RequestError,
)
from loquetier_jax.presets import engine_config
from loquetier_jax.sampling_params import SamplingParams
from tests.engine.engines import SERVE, add_random_adapter, greedy, random_data
from tests.engine.evidence import LORA, quick

HALF = "a\ud800b"  # half a surrogate pair: JSON may hold it, UTF-8 may not


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("max_adapters.x=1", "override"),
        ("max_adapters=[1", "override max_adapters"),
        ("max_adapters=1.5", "max_adapters"),
        ("max_adapters=many", "max_adapters"),
        ("num_kv_pages=-3", "num_kv_pages"),
        ("slice_layers=1.5", "slice_layers"),
        ("max_logprobs=-1", "max_logprobs"),
        ("seed=abc", "seed"),
        ("smlm=foo", "smlm"),
        ("smlm=mosaic", "smlm"),
        ("attention=mosaic", "attention"),
        ("train_attention=foo", "train_attention"),
        ("buckets=5", "buckets"),
        ("compilation_cache_dir=5", "compilation_cache_dir"),
        ("train_pages=true", "train_pages"),
        ("slo.tpot_ms=soon", "SLOConfig.tpot_ms"),
    ],
)
def test_engine_config_refuses_values_by_name(override, name):
    """They raised TypeErrors out of jax and YAML, or ran until the first step that used them failed."""
    with pytest.raises(ConfigError, match=rf"^{name}: got"):
        engine_config("demo", [override])


def test_yaml_files(tmp_path):
    """A malformed one was a traceback, and 1e-3 in a file a string."""
    path = tmp_path / "engine.yaml"
    for content in (b"a: [1\n", b"\xff\xfe", b"- 1\n"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"engine\.yaml: "):
            engine_config(str(path), ["seed=1"])
    path.write_text("slo: {tpot_ms: 5e1}\nbuckets: [{prefill: 16, chunks: 1, decode: 16}]\n")
    assert engine_config(str(path), ["slo.ttft_ms=1e3"]).slo == SLOConfig(tpot_ms=50, ttft_ms=1000)
    (tmp_path / "slo.yaml").write_text("itl_p99_ms: 200\n")
    promised = engine_config(str(path), ["slo.ttft_ms=1e3"], str(tmp_path / "slo.yaml")).slo  # was all of --slo, no -o
    assert promised == SLOConfig(itl_p99_ms=200, ttft_ms=1000)


def test_text_that_no_tokenizer_takes_is_refused(tiny_engine):
    for prompt in (HALF, b"ab"):
        with pytest.raises(RequestError, match="prompt: got"):
            tiny_engine.submit(prompt)
    with pytest.raises(DataError, match=r"data\[1\]: the tokenizer refuses the text"):
        tiny_engine.finetune("job", [{"text": "ab"}, {"text": HALF}], lora=LORA, train=quick())
    with pytest.raises(DataError, match=r"data\[0\]: conversations\[0\]"):
        tiny_engine.finetune("job", [{"conversations": [{"from": ["human"], "value": "a"}]}], lora=LORA, train=quick())
    with pytest.raises(AdapterError, match="adapter: got"):
        tiny_engine.submit("ab", adapter=["a"])
    assert "job" not in tiny_engine.adapters


def test_n_is_bounded():
    """Two billion completions were accepted, and the machine ran out of memory."""
    with pytest.raises(RequestError, match="n: got"):
        SamplingParams(n=2**31 - 1)


def test_jobs_that_cannot_do_what_they_are_told_are_refused(tiny_engine, tmp_path):
    """Evaluation settings without data were ignored; an output_dir that is a file raised FileExistsError."""
    for settings in ({"eval_steps": 1}, {"eval_steps": 1, "early_stopping_patience": 1}):
        with pytest.raises(ConfigError, match="eval_steps: got 1, expected 0 without eval_data"):
            tiny_engine.finetune("job", random_data(0), lora=LORA, train=quick(**settings))
    (tmp_path / "file").touch()
    with pytest.raises(JobError, match="output_dir: got"):
        tiny_engine.finetune("job", random_data(0), lora=LORA, train=quick(output_dir=str(tmp_path / "file")))
    assert "job" not in tiny_engine.adapters


def test_arguments_of_another_type_are_named(tiny_engine, tmp_path):
    """They were TypeErrors of whatever tripped over them first."""
    engine, data = tiny_engine, random_data(0)
    job = engine.finetune("job", data, lora=LORA, train=quick(max_steps=1))
    calls = [
        (AdapterError, "name: got ['a'], expected", lambda: engine.finetune(["a"], data)),
        (AdapterError, "name: got None, expected", lambda: engine.finetune(None, data)),
        (DataError, "data: got NoneType, expected", lambda: engine.finetune("a", None)),
        (DataError, "data: got bytes, expected", lambda: engine.finetune("a", b"ab")),
        (DataError, "eval_data: got int, expected", lambda: engine.finetune("a", data, eval_data=5)),
        (CheckpointError, "path: got None, expected", lambda: engine.resume_job(None, data)),
        (RequestError, "prompts: got None, expected", lambda: engine.generate(None)),
        (RequestError, "prompts: got {'role': 'user'}, expected", lambda: engine.generate({"role": "user"})),
        (RequestError, "adapter: got 5, expected", lambda: engine.generate(["a"], adapter=5)),
        (RequestError, "params: got 5, expected", lambda: engine.generate(["a"], params=5)),
        (RequestError, "sequences: got 5, expected", lambda: engine.log_probs(5)),
        (RequestError, "prompt: got None, expected", lambda: engine.stream(None)),
        (RequestError, "request_id: got ['a'], expected", lambda: engine.submit("a", request_id=["a"])),
        (RequestError, "listener: got 5, expected", lambda: engine.submit("a", listener=5)),
        (AdapterError, "path: got None, expected", lambda: engine.load_adapter("a", None)),
        (AdapterError, "path: got '', expected", lambda: engine.load_adapter("a", "")),
        (AdapterError, "name: got ['a'], expected", lambda: engine.load_adapter(["a"], tmp_path)),
        (AdapterError, "path: got None, expected", lambda: engine.save_adapter("job", None)),
        (AdapterError, "path: got None, expected", lambda: engine.export_merged("job", None)),
        (AdapterError, "weights: got None, expected", lambda: engine.add_adapter("a", None, None)),
        (AdapterError, "shape: got None, expected", lambda: engine.add_adapter("a", {}, None)),
        (JobError, "path: got None, expected", lambda: job.save(None)),
        (CheckpointError, "path: got None, expected", lambda: job.checkpoint(None)),
    ]
    for kind, message, call in calls:
        with pytest.raises(kind, match=f"^{re.escape(message)}"):
            call()
    assert engine.adapters.names() == ["job"] and not engine.loop.serving.waiting
    assert [len(o.outputs) for o in engine.generate(("a", [5, 6]), params=greedy(1))] == [1, 1]


def test_max_length_beyond_the_pack_of_an_engine_without_train_buckets(make_engine, tokenizer):
    """Nobody compared the two: a long sample did not fit its pack, in the middle of a step."""
    engine = make_engine(tokenizer=tokenizer, buckets=(Bucket(**SERVE),))
    with pytest.raises(ConfigError, match="max_length: got 1000"):
        train = quick(pack_tokens=None, max_length=1000)
        engine.finetune("job", [{"text": "a" * 900}], lora=LORA, train=train)
    assert engine.generate([[5, 6, 7]], params=greedy(2))[0].outputs[0].finish_reason == "length"


def test_a_loss_that_cannot_be_compiled_fails_its_job(tiny_engine):
    """Whoever waited was told that nothing was left to do: the job failed after it could be retired."""
    job = tiny_engine.finetune("job", random_data(0), lora=LORA, train=quick(loss=lambda logp, weights: 1 / 0))
    tiny_engine.compiler.wait()
    with pytest.raises(JobError, match="division by zero"):
        job.wait()
    tiny_engine.check_integrity()


@pytest.mark.parametrize("threaded", [False, True])
def test_a_listener_that_waits_is_refused(tiny_engine, threaded):
    """It read later steps before the tokens of the present one were handed out; in the thread it waited for ever."""
    engine, caught = tiny_engine, []

    def listener(_):
        for call in (engine.step, engine.drain, engine.stop, lambda: engine.generate([[5, 6]])):
            with pytest.raises(RuntimeError, match="listener"):
                call()
            caught.append(call)
        engine.cancel(first.request_id)

    pieces = []
    with engine.driver.lock:
        first = engine.submit([5, 6, 7], params=greedy(8), listener=listener)
        second = engine.submit([5, 6, 7], params=greedy(8), listener=pieces.append)
    if threaded:
        engine.start()
    try:
        engine.wait(lambda: second.finished)
    finally:
        engine.stop()
    assert caught and first.requests[0].finish_reason == "abort"
    assert [t for piece in pieces for t in piece.token_ids] == second.output().outputs[0].token_ids
    assert not engine.loop.serving.waiting


def test_a_step_that_is_torn_ends_the_engine(make_engine, monkeypatch):
    """A second Ctrl-C, or a listener that exits, left half a step behind, and the engine went on with it."""
    engine = make_engine()

    def torn():
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.loop, "iterate", torn)
    submitted = engine.submit([5, 6, 7], params=greedy(4))
    with pytest.raises(KeyboardInterrupt):
        engine.wait(lambda: submitted.finished)
    assert submitted.requests[0].finish_reason == "error"
    with pytest.raises(EngineError, match="KeyboardInterrupt"):
        engine.drain()


def test_ctrl_c_during_a_checkpoint_leaves_the_job_running(tiny_engine, tmp_path, monkeypatch):
    """It stayed paused, which nobody had asked for."""
    job = tiny_engine.finetune("job", random_data(0), lora=LORA, train=quick(max_steps=50))
    tiny_engine.wait(lambda: job.step >= 1)
    monkeypatch.setattr(tiny_engine.driver, "wait", lambda done: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            job.checkpoint(tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert job.status == "running"


def test_an_adapter_that_cannot_get_a_page_does_not_spin(tiny_engine, monkeypatch):
    """Pages whose weights are nowhere else count as room and are none: the loop went round without doing anything."""
    names = [f"a{i}" for i in range(tiny_engine.cfg.max_adapters + 1)]
    for i, name in enumerate(names):
        add_random_adapter(tiny_engine, name, i)
    tiny_engine.generate([[5, 6, 7]] * (len(names) - 1), names[:-1], greedy(1))
    with monkeypatch.context() as patch:
        patch.setattr(Residency, "is_elsewhere", lambda self, version: False)
        with pytest.raises(RuntimeError, match="nothing is left to do"):
            tiny_engine.generate([[5, 6, 7]], names[-1], greedy(1))
        assert tiny_engine.generate([[5, 6, 7]], names[0], greedy(1))[0].outputs[0].finish_reason == "length"
    assert tiny_engine.generate([[5, 6, 7]], names[-1], greedy(1))[0].outputs[0].finish_reason == "length"
