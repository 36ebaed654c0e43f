"""SamplingParams: vLLM's defaults, what is refused and how it is said, and the sampling level."""

import dataclasses

import pytest

from loquetier_jax.errors import RequestError
from loquetier_jax.sampling_params import SamplingParams


def test_defaults_are_those_of_vllm() -> None:
    expected = {
        "n": 1,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": None,
        "max_tokens": 16,
        "min_tokens": 0,
        "stop": (),
        "stop_token_ids": (),
        "logit_bias": None,
        "logprobs": None,
        "prompt_logprobs": None,
        "ignore_eos": False,
        "skip_special_tokens": True,
    }
    assert dataclasses.asdict(SamplingParams()) == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", True),
        ("n", 1.5),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("top_k", -2),
        ("top_k", 1.0),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", "x"),
        ("max_tokens", 0),
        ("max_tokens", "all"),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", 3),
        ("stop", [1]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", 5),
        ("logit_bias", {"1": 0.5}),
        ("logit_bias", {-1: 0.5}),
        ("logit_bias", {1: float("inf")}),
        ("logit_bias", [1]),
        ("logprobs", -1),
        ("logprobs", True),
        ("prompt_logprobs", 1.0),
        ("ignore_eos", 1),
        ("skip_special_tokens", None),
    ],
)
def test_bad_value_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(RequestError, match=rf"^{field}.*: got .*, expected "):
        SamplingParams(**{field: value})


def test_unknown_names_and_positions_are_refused() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=0.5)  # ty: ignore
    with pytest.raises(TypeError, match="positional"):
        SamplingParams(2)  # ty: ignore


def test_greedy_completions_would_all_be_the_same() -> None:
    with pytest.raises(RequestError, match=r"^n: got 2, expected 1 when temperature is 0"):
        SamplingParams(n=2, temperature=0)


@pytest.mark.parametrize(
    ("kwargs", "level"),
    [
        ({}, "plain"),
        ({"temperature": 0}, "greedy"),
        ({"temperature": 0, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "seed": 3, "stop": "x"}, "greedy"),
        ({"temperature": 0, "logprobs": 0}, "greedy"),
        ({"temperature": 0, "prompt_logprobs": 5}, "greedy"),
        ({"temperature": 0, "logprobs": 1}, "greedy_logprobs"),
        ({"temperature": 0, "logprobs": 1, "logit_bias": {3: 1}}, "full"),
        ({"logprobs": 1}, "full"),
        ({"temperature": 0, "min_tokens": 1}, "full"),
        ({"temperature": 0, "repetition_penalty": 1.1}, "full"),
        ({"top_k": 5, "top_p": 0.5, "min_p": 0.1}, "plain"),
        ({"presence_penalty": 0.1}, "full"),
        ({"frequency_penalty": -0.1}, "full"),
        ({"logit_bias": {3: 1}}, "full"),
        ({"logit_bias": {}}, "plain"),
    ],
)
def test_level(kwargs: dict, level: str) -> None:
    assert SamplingParams(**kwargs).level == level


def test_no_bound_is_the_room_there_is() -> None:
    """vLLM's max_tokens=None: to the end of the context."""
    params = SamplingParams(max_tokens=None, min_tokens=30)
    assert params.filled(100) == SamplingParams(max_tokens=100, min_tokens=30)
    assert params.filled(-5).max_tokens == 30  # no room at all: refused with the sum of the two
    assert SamplingParams(max_tokens=None).filled(-5).max_tokens == 1
    assert SamplingParams(max_tokens=7).filled(100).max_tokens == 7


def test_is_a_value() -> None:
    bias = {3: 1.0}
    one = SamplingParams(stop="a", stop_token_ids=[1], logit_bias=bias)
    bias[4] = 2.0  # the caller's dict is not ours
    other = SamplingParams(stop=["a"], stop_token_ids=(1,), logit_bias={3: 1.0})
    assert one == other and hash(one) == hash(other)
    assert dataclasses.replace(one, stop=None, stop_token_ids=None).stop == ()


@pytest.mark.parametrize(
    "kwargs",
    [
        {"logit_bias": {10: 1.0}},
        {"stop_token_ids": [10]},
        {"logprobs": 5},
        {"prompt_logprobs": 5},
        {"logit_bias": {1: 1.0, 2: 1.0, 3: 1.0}},
    ],
)
def test_check_against_an_engine(kwargs: dict) -> None:
    params = SamplingParams(**kwargs)
    params.check(vocab_size=11, max_logprobs=5, max_logit_bias=3)
    with pytest.raises(RequestError, match=f"^{next(iter(kwargs))}: got .*, expected "):
        params.check(vocab_size=10, max_logprobs=4, max_logit_bias=2)
