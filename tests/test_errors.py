"""Messages of errors: whatever came, they show it in a line that can be printed."""

import numpy as np
import pytest

from loquetier_jax.adapters.lora import LoraConfig
from loquetier_jax.config import Bucket, EngineConfig
from loquetier_jax.errors import ConfigError, DataError, LoquetierError, RequestError, short
from loquetier_jax.sampling_params import SamplingParams
from loquetier_jax.serve.tokenizer import encode_prompt
from loquetier_jax.train.config import TrainConfig
from loquetier_jax.train.data import load_dataset
from loquetier_jax.train.formats import parse_record
from loquetier_jax.train.records import check_records

ENDLESS = 10**5000  # Python refuses to write it
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def nested():
    value = []
    for _ in range(200_000):  # Python 3.12 writes a depth of 5,000
        value = [value]
    return value


def test_a_value_is_shown_in_few_characters():
    assert short({"a": 1}) == "{'a': 1}"
    assert short("x" * 100) == "'" + "x" * 56 + "..."
    assert len(short("x" * 1000, 200)) == 200
    assert short(ENDLESS) == "a int too large to show"
    assert short(nested()) == "a list too large to show"


def test_half_a_surrogate_pair_can_be_printed():
    error = DataError("got \ud800 in \u00e9t\u00e9")
    assert str(error) == "got \\ud800 in \u00e9t\u00e9"
    assert isinstance(error, LoquetierError) and str(error).encode()


@pytest.mark.parametrize("value", [ENDLESS, nested()], ids=["endless", "nested"])
@pytest.mark.parametrize(
    ("error", "call"),
    [
        (RequestError, lambda value: SamplingParams(top_k=value)),
        (RequestError, lambda value: SamplingParams(logit_bias={5 if isinstance(value, list) else value: value})),
        (RequestError, lambda value: encode_prompt(None, {"x": value})),
        (RequestError, lambda value: encode_prompt(None, [value], 272)),
        (RequestError, lambda value: encode_prompt(None, "text", tools=value)),
        (ConfigError, lambda value: LoraConfig(r=value)),
        (ConfigError, lambda value: TrainConfig(seed=value)),
        (ConfigError, lambda value: EngineConfig(seed=value)),
        (DataError, lambda value: check_records([{"input_ids": [value], "labels": 3}])),
        (DataError, lambda value: check_records([{"input_ids": [value], "labels": [3]}])),
        (DataError, lambda value: parse_record({"messages": TURNS, "tools": {"x": value}}, "here")),
        (DataError, lambda value: parse_record({"conversations": [{"from": value, "value": "x"}]}, "here")),
        (DataError, lambda value: load_dataset([{"text": value}], None, TrainConfig(max_steps=1))),
    ],
)
def test_what_cannot_be_shown_is_refused_all_the_same(error, call, value):
    with pytest.raises(error):
        call(value)


def test_what_is_nested_too_deep_for_a_template_is_refused():
    for column in ("tools", "chat_template_kwargs"):
        given = nested() if column == "tools" else {"x": nested()}
        with pytest.raises(DataError, match=f"here: {column}.*nested too deep"):
            parse_record({"messages": TURNS, column: given}, "here")


def test_stops_that_are_arrays_are_lists():
    assert SamplingParams(stop=np.array(["x", "yz"])).stop == ("x", "yz")
    assert SamplingParams(stop=None).stop == SamplingParams(stop=[]).stop == ()
    with pytest.raises(RequestError, match="stop"):
        SamplingParams(stop=np.ones((2, 2)))


def test_columns_that_are_arrays_are_lists():
    plain = {"messages": TURNS, "tools": [], "history": [], "system": None}
    arrays = {"messages": np.array(TURNS), "tools": np.zeros(0), "history": np.array([]), "system": None}
    assert parse_record(arrays, "here") == parse_record(plain, "here")
    with pytest.raises(DataError, match="history"):
        parse_record({"messages": TURNS, "history": np.array(["a", "b"])}, "here")
    with pytest.raises(DataError, match="tools: got"):
        parse_record({"text": "some", "tools": np.array([1, 2])} | {"prompt": "a", "completion": "b"}, "here")
    with pytest.raises(DataError, match="completion"):
        check_records([{"prompt": "a", "completion": np.array(["b", "c"])}])


def test_a_bucket_that_says_how_it_samples_warns() -> None:
    """Configurations in Python that were written for 0.1's first buckets still work."""
    with pytest.warns(DeprecationWarning, match="sampling has no effect any more: every bucket supports all"):
        old = Bucket(decode=8, sampling="full")
    assert old == Bucket(decode=8) and old.name == "decode8"
    with pytest.raises(ConfigError, match="sampling: got 'loud'"):
        Bucket(decode=8, sampling="loud")
