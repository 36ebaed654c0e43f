"""Invariant 5: log_probs(), the training forward and serving say the same number, to the last bit (f32, XLA CPU).

Every size and level of the sampler against scoring: tests/step/test_head.py.
"""

import numpy as np
import pytest

from loquetier_jax.batch.pack import ScoreItem, pack_step
from loquetier_jax.runtime import loop
from loquetier_jax.train.data import Dataset, make_sample
from loquetier_jax.train.runner import JobRunner
from tests.engine.engines import add_random_adapter, greedy
from tests.engine.evidence import LORA, finish, numbers_of, prompts, train_config

pytestmark = pytest.mark.bits

ADAPTERS = (None, "small", "large")
TOKENS = 16


@pytest.fixture
def engine(tiny_engine):
    add_random_adapter(tiny_engine, "small", 1, 8)
    add_random_adapter(tiny_engine, "large", 2, 24)
    return tiny_engine


def logps(output):
    """f32 log-probs of the tokens of a completion."""
    completion = output.outputs[0]
    rows = zip(completion.logprobs, completion.token_ids, strict=True)
    return np.array([entry[token].logprob for entry, token in rows], np.float32)


def complete(engine, adapter, lengths=(5, 40, 49), seed=0, level=0):
    """Greedy completions: their first tokens come from prefill rows, the others from decode rows."""
    return engine.generate(prompts(seed, *lengths), adapter, greedy(TOKENS, logprobs=level))


def check_scores(engine, outputs, adapter):
    """`log_probs` of prompt and completion ends in what serving said."""
    sequences = [o.prompt_token_ids + o.outputs[0].token_ids for o in outputs]
    for output, scored in zip(outputs, engine.log_probs(sequences, adapter), strict=True):
        served = logps(output)
        assert len(served) == TOKENS
        np.testing.assert_array_equal(scored[-TOKENS:], served)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_scores_equal_what_was_served(engine, adapter):
    check_scores(engine, complete(engine, adapter, (5, 17, 40, 70, 100)), adapter)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_whole_prefill_and_chunks_equal_token_by_token(engine, adapter):
    """The same sequence is cut at many places: what was a decode row is then the last row of a chunk."""
    [output] = complete(engine, adapter, (60,))
    sequence, served = output.prompt_token_ids + output.outputs[0].token_ids, logps(output)
    cuts = range(61, 60 + TOKENS, 3)
    alone = [engine.generate([sequence[:n]], adapter, greedy(1, logprobs=0))[0] for n in cuts]
    # Together they share the prefill rows of a step, so the chunks are others.
    together = engine.generate([sequence[:n] for n in cuts], adapter, greedy(1, logprobs=0))
    for n, one, beside in zip(cuts, alone, together, strict=True):
        assert one.outputs[0].token_ids == beside.outputs[0].token_ids == [sequence[n]]
        np.testing.assert_array_equal(logps(one), served[n - 60])
        np.testing.assert_array_equal(logps(beside), served[n - 60])


def test_every_sampling_level_and_prompt_logprobs_say_the_same(engine):
    cheap, full = complete(engine, "small"), complete(engine, "small", level=3)
    assert numbers_of(cheap) == numbers_of(full)
    [output] = engine.generate(
        [full[1].prompt_token_ids + full[1].outputs[0].token_ids],
        "small",
        greedy(1, prompt_logprobs=0),
    )
    said = [e[t].logprob for t, e in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True) if e]
    np.testing.assert_array_equal(np.array(said[-TOKENS:], np.float32), logps(full[1]))


def train_once(engine, sequences, adapter, beside=()):
    """Log-probs of the training forward of one step on `sequences`, before the weights change, per sequence."""
    found = {}

    def accept(self, done, original=JobRunner.accept_pass):
        results = done.run.results()
        for one, result in zip(done.packs, results, strict=True):
            for segment, sample in enumerate(one.sample_ids):
                found[sample] = result["logp"][one.segments == segment]
        original(self, done)

    samples = tuple(make_sample(ids, [True] * len(ids)) for ids in sequences)
    cfg = train_config(max_steps=1, per_device_train_batch_size=len(samples))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JobRunner, "accept_pass", accept)
        start = {"init_from": adapter} if adapter else {"lora": LORA}
        job = engine.finetune("job", Dataset("d", samples), train=cfg, **start)
        requests = [engine.submit(*one) for one in beside]
        job.wait()
        finish(engine, requests)
    return [found[i] for i in range(len(sequences))]


@pytest.mark.parametrize("busy", [False, True], ids=["alone", "beside requests"])
@pytest.mark.parametrize("adapter", [None, "small"])
def test_training_forward_equals_serving_and_scores(engine, adapter, busy):
    """A job of no training yet is its adapter, and a fresh one (B = 0) is the base."""
    outputs = complete(engine, adapter)
    sequences = [o.prompt_token_ids + o.outputs[0].token_ids for o in outputs]
    others = [(p, "small", greedy(20, logprobs=0)) for p in prompts(9, 30, 60, 9)] if busy else []
    trained = train_once(engine, sequences, adapter, others)
    scored = engine.log_probs(sequences, adapter)
    for one, score, output in zip(trained, scored, outputs, strict=True):
        np.testing.assert_array_equal(one, score)
        np.testing.assert_array_equal(one[-TOKENS:], logps(output))


def test_scoring_without_the_adapter_would_be_seen(engine, monkeypatch):
    outputs = complete(engine, "small")

    def base_only(items, *args):
        items.score = [ScoreItem(item.pack, ()) for item in items.score]
        return pack_step(items, *args)

    monkeypatch.setattr(loop, "pack_step", base_only)
    with pytest.raises(AssertionError):
        check_scores(engine, outputs, "small")
