"""Samples longer than max_length: what each way of truncation keeps, and that what is lost is counted and told."""

import logging

import numpy as np
import pytest

from loquetier_jax.errors import ConfigError, DataError
from loquetier_jax.train.config import TrainConfig
from loquetier_jax.train.data import load_dataset, make_sample, truncate
from loquetier_jax.train.job import Job

LONG = {"prompt": "question", "completion": "a long answer indeed"}
SHORT = {"prompt": "q", "completion": "a"}


def load(tokenizer, records, truncation, max_length=12, **config):
    return load_dataset(records, tokenizer, TrainConfig(max_length=max_length, truncation=truncation, **config))


def ids_of(sample):
    """All ids of a sample whose last target is learnt."""
    return [*sample.tokens.tolist(), int(sample.targets[-1])]


def whole_ids(tokenizer, record):
    """The reference: the tokenizer's own ids of prompt and completion, ended by hand."""
    return [*tokenizer(record["prompt"] + record["completion"])["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("length", [11, 12, 15, 29])
def test_right_keeps_the_first_tokens_and_puts_no_end_in_the_middle(tokenizer, length):
    (sample,) = load(tokenizer, [LONG], "right", length).samples
    whole = whole_ids(tokenizer, LONG)
    assert ids_of(sample) == whole[:length]
    assert tokenizer.eos_token_id not in ids_of(sample)
    prompt = len(tokenizer(LONG["prompt"])["input_ids"])
    assert sample.weights.tolist() == [float(i + 1 >= prompt) for i in range(length - 1)]


@pytest.mark.parametrize("length", [5, 12, 29])
def test_left_keeps_the_last_tokens_and_the_end_behind_the_begin(tokenizer, length):
    (sample,) = load(tokenizer, [LONG], "left", length).samples
    whole = whole_ids(tokenizer, LONG)
    assert ids_of(sample) == [tokenizer.bos_token_id, *whole[len(whole) - length + 1 :]]
    assert ids_of(sample)[-1] == tokenizer.eos_token_id
    assert sample.weights[0] == 0, "what follows the begin token is not its continuation"


def test_left_without_a_begin_token_keeps_the_last_tokens(tokenizer):
    ids = list(range(20))
    (sample,) = load(tokenizer, [{"input_ids": ids}], "left", 8).samples
    assert ids_of(sample) == ids[-8:] and sample.weights.all()


def test_a_sample_that_fits_is_as_it_was(tokenizer):
    length = len(whole_ids(tokenizer, LONG))
    for truncation in ("right", "left", "drop", "error"):
        data = load(tokenizer, [LONG], truncation, length)
        assert ids_of(data.samples[0]) == whole_ids(tokenizer, LONG) and data.left_out == {}


def test_drop_leaves_out_and_error_names_the_line(tokenizer, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "ab"}\n{"text": "' + "a" * 50 + '"}\n')
    data = load_dataset(path, tokenizer, TrainConfig(max_length=10, truncation="drop"))
    assert len(data) == 1 and data.left_out == {"num_dropped": 1}
    with pytest.raises(DataError, match=r"d\.jsonl:2: got 52 tokens, expected at most max_length = 10"):
        load_dataset(path, tokenizer, TrainConfig(max_length=10, truncation="error"))
    with pytest.raises(DataError, match=r"data: none of 2 records is left: 2 too long"):
        load(tokenizer, [LONG] * 2, "drop")
    with pytest.raises(ConfigError, match=r"^truncation: got 'middle', expected one of"):
        TrainConfig(truncation="middle")


def test_what_is_lost_is_counted_and_told(tokenizer, caplog):
    whole = len(whole_ids(tokenizer, LONG))
    with caplog.at_level(logging.WARNING):
        data = load(tokenizer, [LONG, SHORT, LONG, {"prompt": "q", "completion": ""}], "right")
    assert (len(data), data.num_truncated, data.num_tokens_cut, data.num_empty) == (3, 2, 2 * (whole - 12), 1)
    cut, empty = caplog.messages
    assert cut.startswith("data: 2 of 4 samples are longer than 12 tokens and truncated on the right, by ")
    assert f"by {2 * (whole - 12)} tokens" in cut and "end tokens, are not learnt" in cut
    assert empty == "data: 1 of 4 records have an empty answer and are left out, the first is data[3]"


def test_a_job_writes_it_first_in_its_metrics(tokenizer):
    cut, whole = load(tokenizer, [LONG], "right"), load(tokenizer, [SHORT], "right")
    cfg = TrainConfig(max_length=12)
    for data, eval_data, expected in (
        (cut, cut, {"num_truncated": 1, "num_tokens_cut": 18, "eval_num_truncated": 1, "eval_num_tokens_cut": 18}),
        (whole, cut, {"eval_num_truncated": 1, "eval_num_tokens_cut": 18}),
    ):
        job = Job("job", cfg, data, eval_data, clock=lambda: 0.0)
        job.tell_left_out()
        assert job.record.lines == [{"step": 0, "time": 0.0, "epoch": 0.0} | expected]
    job = Job("job", cfg, whole, whole)
    job.tell_left_out()
    assert job.record.lines == []


def test_nothing_to_learn_left_is_refused(tokenizer):
    late = {"prompt": "a prompt of more than twelve", "completion": "b"}
    with pytest.raises(DataError, match=r"data\[1\]: nothing to learn is left of .* by truncation = 'right'; 'drop'"):
        load(tokenizer, [SHORT, late], "right")
    early = {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b" * 30}]}
    with pytest.raises(DataError, match=r"data\[0\]: nothing to learn is left of .* by truncation = 'left'"):
        load(tokenizer, [early], "left")
    assert load(tokenizer, [SHORT, late], "left").num_truncated == 1


def test_truncate_owns_its_arrays():
    sample = make_sample(range(10), [True] * 10)
    cut = truncate(sample, 3, "left", keep_begin=True)
    assert cut.tokens.tolist() == [0, 7, 8] and cut.targets.tolist() == [0, 8, 9] and cut.weights.tolist() == [0, 1, 1]
    assert sample.tokens.tolist() == list(range(9)) and np.all(sample.weights == 1)
