"""How requests are served: chunks, streams, queues, eviction, versions, cancels, promises, a thread of its own."""

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from loquetier_jax.adapters.lora import LoraConfig
from loquetier_jax.config import Bucket, SLOConfig
from loquetier_jax.engine import Engine
from loquetier_jax.errors import CapacityError, RequestError
from loquetier_jax.sampling_params import SamplingParams
from loquetier_jax.train.config import TrainConfig
from tests.engine.engines import SERVE, add_random_adapter, greedy, random_data, random_prompt, reset
from tests.engine.reference import dense_logits, dense_lora, generate, log_softmax
from tests.engine.traffic import busy_engine
from tests.step.cases import random_adapter


@pytest.fixture(scope="module")
def tight_engine(make_engine: Callable[..., Engine]) -> Engine:
    """Two slots, twelve KV pages, two adapter pages."""
    return busy_engine(make_engine, buckets=(Bucket(**SERVE),), max_num_seqs=2, num_kv_pages=13, max_adapters=2)


@pytest.fixture
def tight(tight_engine: Engine) -> Iterator[Engine]:
    yield tight_engine
    reset(tight_engine)


def free(engine: Engine) -> tuple[int, int, int]:
    """(slots, KV pages, adapter pages) that nobody uses, once the device is idle."""
    engine.drain()
    engine.check_integrity()
    serving = engine.loop.serving
    used = sum(v.in_flight > 0 for v in serving.store.versions())
    return serving.slots.num_free, serving.kv.num_free, used


def tokens(engine: Engine, prompt: list[int], adapter: str | None, count: int = 8) -> list[int]:
    return engine.generate([prompt], adapter, greedy(count))[0].outputs[0].token_ids


@pytest.mark.parametrize("length", [1, 15, 16, 17, 47, 48, 49, 97, 110])
def test_a_prompt_in_chunks_is_a_prompt(tiny_engine: Engine, length: int):
    """48 rows of prefill a step: the longest prompts take three."""
    add_random_adapter(tiny_engine, "a", 1, 24)
    prompt = random_prompt(np.random.default_rng(length), length)
    assert tokens(tiny_engine, prompt, "a", 4) == generate(tiny_engine, prompt, "a", greedy(4))


def test_a_stream_is_generate_in_pieces(tiny_engine: Engine, tokenizer: object):
    p = SamplingParams(seed=3, max_tokens=20, ignore_eos=True)
    whole = tiny_engine.generate("Once upon", None, p)[0].outputs[0]
    pieces = list(tiny_engine.stream("Once upon", None, p))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [t for piece in pieces for t in piece.token_ids] == whole.token_ids
    assert [piece.finish_reason for piece in pieces] == [None] * 19 + ["length"]


def test_cancelling_frees_everything_and_disturbs_nobody(tiny_engine: Engine):
    engine, rng = tiny_engine, np.random.default_rng(1)
    add_random_adapter(engine, "a", 2, 8)
    before = free(engine)
    other = engine.submit(random_prompt(rng, 30), "a", greedy(30))
    for when in range(0, 12, 2):  # queued, in the middle of its prompt, decoding
        gone = engine.submit(random_prompt(rng, 100), "a", SamplingParams(n=2, max_tokens=20, ignore_eos=True))
        for _ in range(when):
            engine.step()
        assert engine.cancel(gone.request_id) and not engine.cancel(gone.request_id)
        assert gone.finished and {o.finish_reason for o in gone.output().outputs} == {"abort"}
    engine.wait(lambda: other.finished)
    prompt = other.output().prompt_token_ids
    assert other.output().outputs[0].token_ids == generate(engine, prompt, "a", greedy(30))
    for piece in engine.stream(random_prompt(rng, 9), "a", greedy(40)):
        if len(piece.token_ids):
            break  # leaving a stream cancels its request
    assert free(engine) == before


def test_a_bad_request_is_refused_and_nobody_notices(tiny_engine: Engine):
    engine = tiny_engine
    running = engine.submit([5, 6, 7], None, greedy(12))
    engine.step()
    for prompt, params in (
        ([5] * 125, greedy(10)),
        ([], greedy()),
        ([5, 9999], greedy()),
        ([5], SamplingParams(logprobs=99)),
        ([5], SamplingParams(stop_token_ids=(4000,))),
        ([5], SamplingParams(logit_bias=dict.fromkeys(range(100), 1.0))),
        ([5] * 140, SamplingParams(prompt_logprobs=1, max_tokens=1)),
    ):
        with pytest.raises(RequestError):
            engine.submit(prompt, None, params)
    with pytest.raises(RequestError, match="request_id"):
        engine.submit([5], request_id=running.request_id)
    engine.wait(lambda: running.finished)
    assert running.output().outputs[0].token_ids == generate(engine, [5, 6, 7], None, greedy(12))


def test_the_queue_waits_for_slots_pages_and_adapters(tight: Engine):
    """Twelve requests of five adapters where two slots, twelve KV pages and two adapter pages are all there is."""
    rng = np.random.default_rng(2)
    for i in range(5):
        add_random_adapter(tight, f"a{i}", i + 1, 24 if i == 4 else 8)
    work = [(random_prompt(rng, int(rng.integers(1, 90))), f"a{i % 5}") for i in range(12)]
    crowd = [tight.submit(prompt, name, greedy(8)) for prompt, name in work]
    most = 0
    while not all(one.finished for one in crowd):
        tight.step()
        tight.check_integrity()
        most = max(most, len(tight.loop.serving.running))
    assert most == 2
    for (prompt, name), one in zip(work, crowd, strict=True):
        assert one.output().outputs[0].token_ids == generate(tight, prompt, name, greedy(8))
    assert free(tight) == (2, 12, 0)


def test_the_least_recently_used_adapter_goes_first(tight: Engine):
    for i in range(4):
        add_random_adapter(tight, f"a{i}", i + 1, 8)

    def resident() -> set[str]:
        return {v.name for v in tight.adapters.versions() if v.residency == "device"}

    want = {name: tokens(tight, [5, 6], name) for name in ("a0", "a1")}
    assert resident() == {"a0", "a1"}
    assert tokens(tight, [5, 6], "a0") == want["a0"]
    tokens(tight, [5, 6], "a2")
    assert resident() == {"a0", "a2"}
    tight.pin_adapter("a0")
    tokens(tight, [5, 6], "a1"), tokens(tight, [5, 6], "a3")
    assert resident() == {"a0", "a3"}
    tight.pin_adapter("a3")
    with pytest.raises(CapacityError):
        tight.pin_adapter("a1")
    tight.pin_adapter("a3", pinned=False)
    assert tokens(tight, [5, 6], "a1") == want["a1"], "what was evicted comes back as it was"


def test_a_request_keeps_the_version_of_its_arrival_even_in_the_queue(tight: Engine):
    add_random_adapter(tight, "a", 1, 8)
    prompt = random_prompt(np.random.default_rng(3), 20)
    old = generate(tight, prompt, "a", greedy(8))
    blockers = [tight.submit([5, 6], None, greedy(20)) for _ in range(2)]
    tight.step()
    queued = tight.submit(prompt, "a", greedy(8))
    shape, weights = random_adapter(tight.spec, 9, 16)
    tight.add_adapter("a", weights, shape, replace=True)
    after = tight.submit(prompt, "a", greedy(8))
    tight.unload_adapter("a")
    assert queued.output().outputs[0].token_ids == []
    tight.wait(lambda: queued.finished and after.finished and all(b.finished for b in blockers))
    tight.add_adapter("a", weights, shape)
    new = generate(tight, prompt, "a", greedy(8))
    assert queued.output().outputs[0].token_ids == old != new
    assert after.output().outputs[0].token_ids == new
    assert queued.output().version < after.output().version


def test_log_probs_are_the_dense_models(tiny_engine: Engine):
    add_random_adapter(tiny_engine, "a", 4, 24)
    rng = np.random.default_rng(4)
    sequences = [random_prompt(rng, int(n)) for n in (2, 3, 33, 60, 128, 20)]
    for adapter in (None, "a"):
        logits = dense_logits(tiny_engine, sequences, dense_lora(tiny_engine, adapter))
        for ids, got, dense in zip(sequences, tiny_engine.log_probs(sequences, adapter), logits, strict=True):
            want = np.take_along_axis(log_softmax(dense[:-1]), np.asarray(ids[1:])[:, None], 1)[:, 0]
            np.testing.assert_allclose(got, want, atol=2e-5)
    with pytest.raises(RequestError, match=r"sequences\[1\]"):
        tiny_engine.log_probs([[5, 6], [5]])


def test_a_thread_of_its_own_serves_and_trains(tiny_engine: Engine):
    engine = tiny_engine
    add_random_adapter(engine, "a", 5, 8)
    want = {name: generate(engine, [7, 8, 9], name, greedy(6)) for name in (None, "a")}
    train = TrainConfig(max_steps=4, pack_tokens=64)
    engine.start()
    try:
        job = engine.finetune("job", random_data(1), lora=LoraConfig(r=8), train=train)
        for _ in range(3):
            outs = engine.generate([[7, 8, 9]] * 2, [None, "a"], greedy(6))
            assert [o.outputs[0].token_ids for o in outs] == list(want.values())
        assert [p.token_ids[0] for p in engine.stream([7, 8, 9], "a", greedy(6)) if p.token_ids] == want["a"]
        deadline = time.monotonic() + 120
        while job.status != "succeeded" and time.monotonic() < deadline:
            time.sleep(0.01)  # nobody drives, nobody waits
        assert job.wait().step == 4
        assert len(engine.log_probs([[5, 6, 7]], "job")[0]) == 2
    finally:
        engine.stop()
    engine.check_integrity()
    assert tokens(engine, [7, 8, 9], "a", 6) == want["a"], "afterwards the caller drives again"


@pytest.mark.parametrize("slo", [SLOConfig(ttft_ms=60_000, tpot_ms=20_000), SLOConfig(ttft_ms=1e-3, tpot_ms=1e-3)])
def test_a_promise_changes_when_things_run_and_nothing_else(tiny_engine: Engine, slo: SLOConfig):
    """One promise leaves room for whole passes between two tokens, the other cannot be kept at all."""
    engine, rng = tiny_engine, np.random.default_rng(6)
    train = TrainConfig(max_steps=5, pack_tokens=64, per_device_train_batch_size=5, learning_rate=1e-2)

    def losses(name: str) -> list[float]:
        job = engine.finetune(name, random_data(2), lora=LoraConfig(r=8), train=train)
        prompts = [random_prompt(rng, 20) for _ in range(6)]
        outs = engine.generate(prompts, None, greedy(30))
        assert all(len(o.outputs[0].token_ids) == 30 for o in outs)
        return [line["loss"] for line in job.wait().metrics]

    want, before = losses("without"), engine.loop.slo
    engine.loop.slo = slo
    try:
        assert losses("with") == want
    finally:
        engine.loop.slo = before


class NeverScanned(dict):
    """Requests by id that may be asked for, and not gone through."""

    def _refuse(self, *_: object) -> None:
        raise AssertionError("submit and cancel take as long as there are requests")

    __iter__ = keys = values = items = _refuse


def test_what_a_submit_costs_does_not_grow_with_the_queue(tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch):
    """Every submit and every cancel went through all live requests, so 50,000 prompts took minutes."""
    serving = tiny_engine.loop.serving
    with monkeypatch.context() as patch:
        patch.setattr(serving, "waiting", NeverScanned())
        patch.setattr(serving, "running", NeverScanned())
        pair = tiny_engine.submit([5, 6], None, greedy(2, n=2, temperature=1.0), request_id="pair")
        for taken in ("pair", "pair-1"):
            with pytest.raises(RequestError, match="not used by a live request"):
                tiny_engine.submit([5, 6], None, greedy(2), request_id=taken)
        other = tiny_engine.submit([5, 6], None, greedy(2))
        assert tiny_engine.cancel("pair") and not tiny_engine.cancel("pair")
        assert pair.finished and not other.finished
        assert tiny_engine.cancel(other.request_id)
    assert not tiny_engine.loop.serving.is_live("pair")
