"""What ends a request, what it returns, and what happens to tokens after the end."""

import pytest
from transformers import PreTrainedTokenizerFast

from loquetier_jax.errors import RequestError
from loquetier_jax.sampling_params import SamplingParams
from loquetier_jax.serve.make_requests import completion_seed, make_requests
from loquetier_jax.serve.output import Logprob, StreamPiece
from loquetier_jax.serve.request import Request, collect

EOS = 257


def request(tokenizer: PreTrainedTokenizerFast | None, **kwargs) -> Request:
    params = SamplingParams(**{"max_tokens": 64, **kwargs})
    [made] = make_requests(
        "r", [1, 2, 3], params, arrival=10.0, max_model_len=100, tokenizer=tokenizer, eos_token_ids=[EOS, 7]
    )
    return made


def feed(r: Request, ids: list[int]) -> list[StreamPiece | None]:
    return [r.accept(t, -0.5, None, 11.0 + i) for i, t in enumerate(ids)]


def test_eos_ends_and_leaves_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    r = request(tokenizer, skip_special_tokens=False)
    pieces = feed(r, [*tokenizer.encode("hi"), EOS, *tokenizer.encode("no")])
    assert [p and p.text for p in pieces] == ["h", "i", "", None, None]
    assert pieces[2] == StreamPiece("", (EOS,), "stop", 0)
    assert (r.status, r.finish_reason, r.stop_reason, r.text) == ("finished", "stop", None, "hi")
    assert r.output_ids[-1] == EOS and len(r.output_ids) == 3
    assert r.metrics.token_times == [11.0, 12.0, 13.0] and r.metrics.finished_time == 13.0


def test_ignore_eos_goes_to_the_length(tokenizer: PreTrainedTokenizerFast) -> None:
    r = request(tokenizer, ignore_eos=True, max_tokens=3)
    feed(r, [EOS, EOS, EOS, EOS])
    assert (r.finish_reason, r.output_ids, r.text) == ("length", [EOS] * 3, "")


def test_stop_token_id_is_the_reason_unless_it_is_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    r = request(tokenizer, stop_token_ids=[70, EOS])
    feed(r, [71, 70])
    assert (r.finish_reason, r.stop_reason, r.output_ids) == ("stop", 70, [71, 70])
    r = request(tokenizer, stop_token_ids=[EOS])
    feed(r, [EOS])
    assert (r.finish_reason, r.stop_reason) == ("stop", None)
    r = request(tokenizer, stop_token_ids=[EOS], ignore_eos=True)
    feed(r, [EOS])
    assert (r.finish_reason, r.stop_reason) == ("stop", EOS)


@pytest.mark.parametrize("min_tokens", [0, 1, 2, 3])
def test_nothing_ends_before_min_tokens(tokenizer: PreTrainedTokenizerFast, min_tokens: int) -> None:
    r = request(tokenizer, min_tokens=min_tokens, stop_token_ids=[70])
    feed(r, [70] * 5)
    assert len(r.output_ids) == min_tokens + 1
    r = request(tokenizer, min_tokens=min_tokens, stop="x")
    feed(r, tokenizer.encode("xxxxx"))
    assert (len(r.output_ids), r.text) == (min_tokens + 1, "x" * min_tokens)


def test_stop_string_is_held_back_and_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    r = request(tokenizer, stop=["###", "\n\n"])
    pieces = feed(r, tokenizer.encode("a#b\n\nc"))
    assert [p and p.text for p in pieces] == ["a", "", "#b", "", "", None]
    assert (r.text, r.finish_reason, r.stop_reason) == ("a#b", "stop", "\n\n")


def test_held_text_is_released_at_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode("a##")
    for end, reason in (([], "length"), ([EOS], "stop")):
        r = request(tokenizer, stop="###", max_tokens=3 + len(end))
        pieces = feed(r, ids + end)
        assert "".join(p.text for p in pieces if p) == r.text == "a##"
        assert r.finish_reason == reason


def test_broken_character_at_the_end_is_shown(tokenizer: PreTrainedTokenizerFast) -> None:
    r = request(tokenizer, max_tokens=2)
    feed(r, tokenizer.encode("€"))
    assert (r.text, r.finish_reason) == ("\ufffd", "length")


def test_without_tokenizer_there_is_no_text() -> None:
    r = request(None, max_tokens=2)
    assert [p and p.text for p in feed(r, [5, 6, 8])] == ["", "", None]
    with pytest.raises(RequestError, match=r"^stop: got .*, expected none"):
        request(None, stop="x")


def test_logprobs(tokenizer: PreTrainedTokenizerFast) -> None:
    r = request(tokenizer, logprobs=2)
    r.accept(5, -3.0, [(8, -0.1), (9, -0.2), (5, -3.0)], 11.0, rank=3)
    r.accept(8, -0.1, [(8, -0.1), (9, -0.2), (5, -3.0)], 12.0, rank=1)
    out = collect([r]).outputs[0]
    assert out.logprobs == [
        {8: Logprob(-0.1, 1), 9: Logprob(-0.2, 2), 5: Logprob(-3.0, 3)},
        {8: Logprob(-0.1, 1), 9: Logprob(-0.2, 2)},
    ]
    assert out.cumulative_logprob == pytest.approx(-3.1)
    plain = request(tokenizer)
    feed(plain, [5])
    assert collect([plain]).outputs[0].logprobs is None and plain.token_logprobs == [-0.5]


def test_abort_and_failure(tokenizer: PreTrainedTokenizerFast) -> None:
    r = request(tokenizer, stop="##")
    feed(r, tokenizer.encode("a#"))
    assert r.abort(20.0) == StreamPiece("#", (), "abort", 0)
    assert r.abort(21.0) is None and r.accept(5, 0.0, None, 22.0) is None and r.metrics.finished_time == 20.0
    waiting = request(tokenizer)
    assert waiting.fail("adapter is gone", 1.0) == StreamPiece("", (), "error", 0)
    assert (waiting.finish_reason, waiting.stop_reason) == ("error", "adapter is gone")


def test_times(tokenizer: PreTrainedTokenizerFast) -> None:
    r = request(tokenizer, max_tokens=3)
    assert r.metrics.ttft is None and r.metrics.tpot is None and r.metrics.queue_time is None
    r.metrics.first_scheduled_time = 10.5
    for t in (11.0, 13.0, 14.0):
        r.accept(5, 0.0, None, t)
    m = collect([r]).metrics
    assert (m.ttft, m.tpot, m.itl, m.queue_time) == (1.0, 1.5, [2.0, 1.0], 0.5)


def test_n_completions_have_their_own_seeds(tokenizer: PreTrainedTokenizerFast) -> None:
    made = make_requests(
        "r",
        [1, 2],
        SamplingParams(n=3, seed=5),
        arrival=0.0,
        max_model_len=64,
        tokenizer=tokenizer,
        adapter="a",
    )
    assert [r.id for r in made] == ["r", "r-1", "r-2"] and {r.request_id for r in made} == {"r"}
    assert [r.seed for r in made] == [completion_seed(5, i) for i in range(3)]
    assert len({completion_seed(s, i) for s in range(30) for i in range(30)}) == 900
    for r in made:
        feed(r, [3, EOS])
    out = collect(made[::-1])
    assert [o.index for o in out.outputs] == [0, 1, 2]
    made[2].version = 9  # a version belongs to the request, the output reports the first one's
    assert (out.request_id, out.adapter, out.prompt_token_ids) == ("r", "a", [1, 2])


def test_refused_before_anything_is_made() -> None:
    with pytest.raises(RequestError, match=r"^prompt: got no tokens"):
        make_requests("r", [], SamplingParams(), arrival=0.0, max_model_len=10)
    with pytest.raises(RequestError, match=r"3 tokens \+ max_tokens 16 = 19, expected <= max_model_len 18"):
        make_requests("r", [1, 2, 3], SamplingParams(), arrival=0.0, max_model_len=18)


def test_what_the_engine_asks_of_a_request(tokenizer: PreTrainedTokenizerFast) -> None:
    r = request(tokenizer, stop_token_ids=[9])
    assert (r.num_tokens, r.num_remaining, r.stop_ids) == (67, 3, (7, 9, EOS))
    r.num_prefilled = 2
    assert r.num_remaining == 1
    assert request(tokenizer, ignore_eos=True, stop_token_ids=[9]).stop_ids == (9,)
