"""Sampling against brute force in numpy: each transform, the draw itself, and whole requests token by token."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
from scipy import stats

from loquetier_jax.batch.rows import MAX_BANNED, SampleRows
from loquetier_jax.engine import Engine
from loquetier_jax.sampling_params import LEVELS, Level, SamplingParams, level_of
from loquetier_jax.serve.output import CompletionOutput
from loquetier_jax.step import sample as sampler
from loquetier_jax.step.head import Distribution
from tests.engine.engines import SERVE, add_random_adapter, greedy, random_prompt
from tests.engine.reference import dense_logits, dense_lora, generate, log_softmax, processed

VOCAB = 40
DROPPED = -1e29  # at or below: the sampler's way to say minus infinity


def rows_of(params: Sequence[SamplingParams], seeds: Sequence[int], index: Any = 0, stop_ids: Sequence[int] = ()):
    """One row for each of `params`, row i in slot i."""
    n = len(params)

    def field(name: str, dtype: Any = np.float32) -> np.ndarray:
        return np.array([getattr(p, name) for p in params], dtype)

    bias_ids, bias = np.full((n, 4), -1, np.int32), np.zeros((n, 4), np.float32)
    banned = np.full((n, MAX_BANNED), -1, np.int32)
    index = np.broadcast_to(np.asarray(index, np.int32), n)
    for i, p in enumerate(params):
        for j, (token, value) in enumerate((p.logit_bias or {}).items()):
            bias_ids[i, j], bias[i, j] = token, value
        if index[i] < p.min_tokens:
            banned[i, : len(stop_ids)] = stop_ids
    return SampleRows(
        slots=np.arange(n, dtype=np.int32),
        index=index,
        seed=np.asarray(seeds, np.uint32),
        top_k=field("top_k", np.int32),
        bias_ids=bias_ids,
        bias=bias,
        banned_ids=banned,
        **{name: field(name) for name in ("temperature", "top_p", "min_p")},
        **{f"{name}_penalty": field(f"{name}_penalty") for name in ("repetition", "presence", "frequency")},
    )


def slots_of(prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> sampler.SlotState:
    counts = np.array([*(np.bincount(o, minlength=VOCAB) for o in outputs), np.zeros(VOCAB)], np.int32)
    seen = np.zeros((len(prompts) + 1, VOCAB), bool)
    for row, prompt in zip(seen, prompts, strict=False):
        row[list(prompt)] = True
    return sampler.SlotState(last_token=np.zeros(len(prompts) + 1, np.int32), counts=counts, prompt_seen=seen)


@jax.jit
def transformed(logits: Any, rows: Any, slots: Any) -> Any:
    logits = sampler.penalize(logits, rows, slots)
    hot = rows.temperature > 0
    return jax.numpy.where(
        hot[:, None],
        sampler.truncate(logits / jax.numpy.where(hot, rows.temperature, 1.0)[:, None], rows),
        logits,
    )


@functools.partial(jax.jit, static_argnames="level")
def sampled(logits: Any, rows: Any, slots: Any, level: Level) -> Any:
    best = logits.max(axis=-1)
    total = jax.numpy.log(jax.numpy.exp(logits - best[:, None]).sum(axis=-1))
    return sampler.sample(Distribution(logits, best, total), rows, slots, level=level, max_logprobs=4)


def random_params(rng: np.random.Generator) -> SamplingParams:
    def maybe(value: Any, neutral: Any) -> Any:
        return value if rng.random() < 0.5 else neutral

    return SamplingParams(
        temperature=maybe(float(rng.uniform(0.2, 2)), 1.0) if rng.random() < 0.9 else 0.0,
        top_k=maybe(int(rng.integers(1, VOCAB + 5)), maybe(-1, 0)),
        top_p=maybe(float(rng.uniform(0.05, 0.99)), 1.0),
        min_p=maybe(float(rng.uniform(0.01, 0.5)), 0.0),
        repetition_penalty=maybe(float(rng.uniform(0.5, 2)), 1.0),
        presence_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        frequency_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        logit_bias=maybe({int(t): float(rng.normal() * 3) for t in rng.choice(VOCAB, 3, replace=False)}, None),
        min_tokens=maybe(3, 0),
    )


def test_every_transform_matches_brute_force():
    rng = np.random.default_rng(0)
    stop_ids = (1, 7)
    params = [random_params(rng) for _ in range(256)]
    logits = (3 * rng.normal(size=(256, VOCAB))).astype(np.float32)
    prompts = [rng.integers(0, VOCAB, rng.integers(1, 9)) for _ in params]
    outputs = [rng.integers(0, VOCAB, rng.integers(0, 9)) for _ in params]
    index = np.array([len(o) for o in outputs], np.int32)
    got = np.asarray(transformed(logits, rows_of(params, np.arange(256), index, stop_ids), slots_of(prompts, outputs)))
    for i, p in enumerate(params):
        want = processed(logits[i], p, prompts[i], outputs[i], stop_ids)
        assert (got[i] > DROPPED).tolist() == np.isfinite(want).tolist(), p
        kept = np.isfinite(want)
        np.testing.assert_allclose(got[i][kept], want[kept], rtol=1e-5, atol=1e-5, err_msg=str(p))


def test_a_row_without_top_p_keeps_its_tail_whatever_its_neighbours_want():
    """In f32 the cumulated probability reaches 1 before the tail; a neighbour's top_k must not cut that off."""
    logits = np.zeros((2, VOCAB), np.float32)
    logits[:, 0] = 30.0
    slots = slots_of([[0], [0]], [[], []])
    got = np.asarray(transformed(logits, rows_of([SamplingParams(), SamplingParams(top_k=2)], [0, 0]), slots))
    assert (got[0] == logits[0]).all()


DRAWS = 4096
CASES = {
    "softmax": SamplingParams(),
    "temperature": SamplingParams(temperature=1.7),
    "top_k": SamplingParams(top_k=5),
    "top_p": SamplingParams(top_p=0.8, temperature=1.3),
    "min_p": SamplingParams(min_p=0.1),
    "all": SamplingParams(temperature=1.5, top_k=12, top_p=0.9, min_p=0.02, logit_bias={3: 2.0}, presence_penalty=1.0),
}


def assert_drawn_from(tokens: np.ndarray, logits: np.ndarray) -> None:
    """Chi-square of the counts against softmax(logits); what has been dropped never comes."""
    probs = np.exp(log_softmax(np.where(np.isfinite(logits), logits, -1e9)))
    counts = np.bincount(tokens, minlength=len(probs))
    assert counts[~np.isfinite(logits)].sum() == 0
    often = probs * len(tokens) >= 5
    groups = [*np.flatnonzero(often), np.flatnonzero(~often)]
    observed = np.array([counts[g].sum() for g in groups], np.float64)
    expected = np.array([probs[g].sum() for g in groups]) * len(tokens)
    inside = expected > 0
    expected = expected[inside] * (observed[inside].sum() / expected[inside].sum())
    assert stats.chisquare(observed[inside], expected).pvalue > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_draws_follow_the_softmax_over_seeds_and_over_output_indices(case: str):
    p = CASES[case]
    rng = np.random.default_rng(5)
    logits = (1.5 * rng.normal(size=VOCAB)).astype(np.float32)
    slots = slots_of([[1, 2]] * DRAWS, [[4]] * DRAWS)
    want = processed(logits, p, [1, 2], [4], ())
    tiled = np.tile(logits, (DRAWS, 1))
    over = np.arange(DRAWS)
    for seeds, index in ((over, 0), (np.full(DRAWS, 77), over)):
        _, out = sampled(tiled, rows_of([p] * DRAWS, seeds, index), slots, level="full")
        assert_drawn_from(np.asarray(out["tokens"]), want)


def test_levels_agree_where_they_overlap():
    """A request's tokens do not depend on which compiled sampler its neighbours needed."""
    rng = np.random.default_rng(6)
    params = [SamplingParams(temperature=t, top_k=k) for t in (0.0, 0.7, 1.0) for k in (0, 3)]
    logits = rng.normal(size=(len(params), VOCAB)).astype(np.float32)
    rows, slots = rows_of(params, range(6)), slots_of([[1]] * 6, [[]] * 6)
    out = {level: jax.tree.map(np.asarray, sampled(logits, rows, slots, level=level)[1]) for level in LEVELS}
    full = out["full"]
    for name in ("tokens", "logprob"):
        np.testing.assert_array_equal(full[name], out["plain"][name])
        for level in ("greedy", "greedy_logprobs"):
            np.testing.assert_array_equal(full[name][:2], out[level][name][:2])
    for name in ("top_ids", "top_logp", "rank"):
        np.testing.assert_array_equal(full[name][:2], out["greedy_logprobs"][name][:2])
    assert [level for level in LEVELS if "rank" in out[level]] == ["greedy_logprobs", "full"]
    own = np.take_along_axis(log_softmax(logits), np.asarray(full["tokens"])[:, None], 1)[:, 0]
    np.testing.assert_allclose(full["logprob"], own, atol=1e-5)


def test_the_level_of_a_step_does_the_work_of_all_its_rows():
    """Alternatives and temperatures together need the one level that has both."""
    for one in LEVELS:
        assert level_of([one, "greedy", one]) == one and level_of([one, "full"]) == "full"
    assert level_of([]) == "greedy" and level_of(["plain", "greedy_logprobs"]) == "full"


def test_a_step_runs_the_sampler_that_its_rows_need(tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch):
    """None while a prompt goes on; else the cheapest that does what all rows ask for."""
    asked, sampler, rows = [], tiny_engine.functions.sampler, SERVE["decode"] + SERVE["chunks"]

    def note(rows: int, level: Level) -> Any:
        asked.append((rows, level))
        return sampler(rows, level)

    monkeypatch.setattr(tiny_engine.functions, "sampler", note)
    cold, hot, logged = greedy(3), SamplingParams(max_tokens=3, ignore_eos=True), greedy(3, logprobs=2)
    for params, level in (
        ([cold], "greedy"),
        ([cold, logged], "greedy_logprobs"),
        ([cold, hot], "plain"),
        ([logged, hot], "full"),
        ([cold, greedy(3, presence_penalty=1.0)], "full"),
    ):
        tiny_engine.generate([[3, 4, 5]] * len(params), None, params)
        assert asked == [(rows, level)] * 3
        asked.clear()
    tiny_engine.generate([[3] * (2 * SERVE["prefill"] + 1)], None, greedy(1))
    assert asked == [(rows, "greedy")]


REQUESTS = [
    SamplingParams(seed=1, max_tokens=8, ignore_eos=True),
    SamplingParams(seed=2, max_tokens=8, temperature=0.8, top_k=20, ignore_eos=True),
    SamplingParams(seed=3, max_tokens=8, temperature=1.2, top_p=0.7, min_p=0.01, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=8, repetition_penalty=1.8, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=8, presence_penalty=1.5, frequency_penalty=0.7, ignore_eos=True),
    SamplingParams(seed=4, max_tokens=8, repetition_penalty=0.6, frequency_penalty=-1.0, logit_bias={9: 6.0, 30: 4.0}),
    SamplingParams(seed=5, max_tokens=8, min_tokens=5, logit_bias={1: 30.0}, top_k=3),
    SamplingParams(seed=6, max_tokens=8, stop_token_ids=(9,), logit_bias={9: 3.0}, ignore_eos=True),
]


def test_requests_follow_the_dense_reference_and_their_seed_wherever_they_run(tiny_engine: Engine):
    engine, rng = tiny_engine, np.random.default_rng(7)
    add_random_adapter(engine, "a", 1, 8)
    add_random_adapter(engine, "b", 2, 24)
    prompts = [random_prompt(rng, int(n)) for n in rng.integers(3, 60, len(REQUESTS))]
    adapters = [None, "a", "b", "a", None, "b", None, "a"]
    crowd = [o.outputs[0] for o in engine.generate(prompts, adapters, REQUESTS)]
    for prompt, adapter, p, out in zip(prompts, adapters, REQUESTS, crowd, strict=True):
        alone = engine.generate([prompt], adapter, p)[0].outputs[0]
        assert alone.token_ids == out.token_ids, p
        assert generate(engine, prompt, adapter, p) == out.token_ids, p
    assert crowd[6].finish_reason == "stop"
    assert len(crowd[6].token_ids) == 6, "min_tokens holds the end of sequence back, then it comes at once"


def test_n_completions_are_n_seeds_of_one_prompt(tiny_engine: Engine):
    prompt = random_prompt(np.random.default_rng(8), 12)
    p = SamplingParams(n=4, seed=11, max_tokens=6, ignore_eos=True)
    first, again = tiny_engine.generate([prompt, prompt], None, p)
    tokens = [o.token_ids for o in first.outputs]
    assert [o.index for o in first.outputs] == [0, 1, 2, 3]
    assert tokens == [o.token_ids for o in again.outputs]
    assert len({tuple(t) for t in tokens}) == 4
    assert tokens == [generate(tiny_engine, prompt, None, p, i) for i in range(4)]
    free = [tiny_engine.generate([prompt], None, SamplingParams(max_tokens=6, ignore_eos=True))[0] for _ in range(2)]
    assert free[0].outputs[0].token_ids != free[1].outputs[0].token_ids, "without a seed the engine chooses a new one"


def test_stop_strings_and_ids_end_a_request_and_min_tokens_holds_them_back(tiny_engine: Engine, tokenizer: Any):
    letters = {tokenizer.encode(c)[-1]: 50.0 for c in "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKL"}
    prompt = tokenizer.encode("Once upon a time")

    def run(**changes: Any) -> CompletionOutput:
        p = SamplingParams(seed=5, max_tokens=24, logit_bias=letters, ignore_eos=True, **changes)
        return tiny_engine.generate([prompt], None, p)[0].outputs[0]

    whole = run()
    assert whole.text == tokenizer.decode(whole.token_ids) and len(whole.text) == 24
    stop = whole.text[5:8]
    cut = run(stop=[stop, "nowhere"])
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.token_ids == whole.token_ids[: len(cut.text) + 3], "no surplus token of running one step ahead"
    late = run(stop=stop, min_tokens=12)
    assert late.token_ids[:12] == whole.token_ids[:12] and late.text.startswith(whole.text[:9])

    token = whole.token_ids[6]
    first = whole.token_ids.index(token)
    by_id = run(stop_token_ids=(token,))
    assert (by_id.finish_reason, by_id.stop_reason) == ("stop", token)
    assert by_id.token_ids == whole.token_ids[: first + 1] and by_id.text == whole.text[:first]
    held = run(stop_token_ids=(token,), min_tokens=24)
    assert held.finish_reason == "length" and token not in held.token_ids


def test_special_tokens_are_left_out_of_the_text_as_the_tokenizer_does(tiny_engine: Engine, tokenizer: Any):
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    for skip in (True, False):
        p = greedy(6, logit_bias={end: 20.0}, frequency_penalty=2.0, skip_special_tokens=skip)
        out = tiny_engine.generate([[5, 6]], None, p)[0].outputs[0]
        assert end in out.token_ids
        assert out.text == tokenizer.decode(out.token_ids, skip_special_tokens=skip)


def test_the_end_of_sequence_ends_unless_ignored(tiny_engine: Engine):
    prompt = random_prompt(np.random.default_rng(9), 5)
    out = tiny_engine.generate([prompt], None, SamplingParams(temperature=0, max_tokens=9, logit_bias={1: 99.0}))
    assert (out[0].outputs[0].token_ids, out[0].outputs[0].finish_reason) == ([1], "stop")
    assert out[0].outputs[0].stop_reason is None and out[0].outputs[0].text == ""
    out = tiny_engine.generate([prompt], None, greedy(9, logit_bias={1: 99.0}))
    assert (out[0].outputs[0].token_ids, out[0].outputs[0].finish_reason) == ([1] * 9, "length")


def test_logprobs_of_output_and_prompt_are_the_dense_models(tiny_engine: Engine):
    engine = tiny_engine
    add_random_adapter(engine, "a", 3, 16)
    prompt = random_prompt(np.random.default_rng(10), 21)
    p = SamplingParams(seed=3, max_tokens=7, logprobs=3, prompt_logprobs=2, temperature=1.4, ignore_eos=True)
    result, bare = engine.generate([prompt, prompt], "a", [p, greedy(4, logprobs=0)])
    out = result.outputs[0]
    logp = log_softmax(dense_logits(engine, [[*prompt, *out.token_ids]], dense_lora(engine, "a"))[0])
    entries = [*result.prompt_logprobs[1:], *out.logprobs]
    for at, (token, entry) in enumerate(zip([*prompt[1:], *out.token_ids], entries, strict=True)):
        top = np.argsort(-logp[at])[: 2 if at < len(prompt) - 1 else 3].tolist()
        assert set(entry) == {*top, token}
        for i, one in entry.items():
            assert one.logprob == pytest.approx(logp[at, i], abs=1e-4)
            assert one.rank == 1 + (logp[at] > logp[at, i]).sum()
    assert result.prompt_logprobs[0] is None and len(result.prompt_logprobs) == len(prompt)
    own = [entry[token].logprob for token, entry in zip(out.token_ids, out.logprobs, strict=True)]
    assert out.cumulative_logprob == pytest.approx(sum(own))
    assert [list(e) for e in bare.outputs[0].logprobs] == [[t] for t in bare.outputs[0].token_ids]
    assert bare.prompt_logprobs is None and all(e[t].rank is None for e in bare.outputs[0].logprobs for t in e)
