"""Data in every form it comes in: files as people download them, iterables, token ids; each checked, with its line."""

import codecs
import json

import numpy as np
import pytest

from loquetier_jax.errors import DataError
from loquetier_jax.serve.tokenizer import encode_prompt
from loquetier_jax.train.config import TrainConfig
from loquetier_jax.train.data import Dataset, Sample, load_dataset, make_sample
from loquetier_jax.train.records import check_records

ROWS = [{"instruction": "a", "input": "", "output": "b"}, {"prompt": "é", "completion": "ü"}]
CFG = TrainConfig(pack_tokens=256)
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
FILES = {
    "lines": LINES.encode(),
    "lines ended by Windows": LINES.replace("\n", "\r\n").encode(),
    "array": json.dumps(ROWS, indent=2).encode(),
    "array on a line": json.dumps(ROWS).encode(),
    "array after blank lines": b"\n \n" + json.dumps(ROWS, indent=1).encode() + b"\n\n",
    "UTF-8 with a mark": codecs.BOM_UTF8 + LINES.encode(),
    "array with a mark": codecs.BOM_UTF8 + json.dumps(ROWS).encode(),
    "UTF-16": LINES.encode("utf-16"),
    "UTF-16, big end first": codecs.BOM_UTF16_BE + LINES.encode("utf-16-be"),
    "UTF-32": LINES.encode("utf-32"),
}


class Columns:
    """A `datasets.Dataset` of two records, as far as anybody asks: keys of one record are null in the other."""

    column_names = ("instruction", "input", "output", "prompt", "completion")

    def __iter__(self):
        return ({key: row.get(key) for key in self.column_names} for row in ROWS)


class Indexed:
    """A sequence by the old protocol alone."""

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, i):
        return ROWS[i]


def test_files_and_iterables_hold_the_same_data(tokenizer, tmp_path):
    expected = load_dataset(ROWS, tokenizer, CFG).fingerprint
    path = tmp_path / "data.json"
    for content in FILES.values():
        path.write_bytes(content)
        for given in (path, str(path)):
            assert load_dataset(given, tokenizer, CFG).fingerprint == expected
    for data in (tuple(ROWS), (row for row in ROWS), Columns(), Indexed(), dict(enumerate(ROWS)).values()):
        assert load_dataset(data, tokenizer, CFG).fingerprint == expected


def test_nulls_that_arrow_adds_are_taken_out_again_at_any_depth(tokenizer):
    class Chats(list):
        column_names = ("messages", "tools")

    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    filled = [{"messages": [{**m, "weight": None, "tool_calls": None} for m in messages], "tools": None}]
    expected = load_dataset([{"messages": messages}], tokenizer, CFG).fingerprint
    assert load_dataset(Chats(filled), tokenizer, CFG).fingerprint == expected


BROKEN = {
    '[\n{"text": "a"},\n{"text": 3}\n]': r"d\.json:3: record 1: text: got 3",
    '[{"text": "a"}, 5]': r"d\.json:1: record 1: got int, expected a JSON object",
    '\n[{"text": "a"}\n{"text": "b"}]': r"d\.json:3: not JSON: got '\{\"text\": \"b\"\}\]' after 1 records",
    '[\n{"text": "a"},\n{"text": }]': r"d\.json:3: record 1: not JSON: Expecting value.*; expected one JSON object",
    '[{"text": "a"},]': r"d\.json:1: record 1: not JSON",
    '[{"text": "a"}] []': r"d\.json:1: not JSON: got",
    '[{"text": "a"}': r"d\.json:1: not JSON: got '' after 1 records",
    "[]": "no records",
    '{\n"text": "a"\n}': r"d\.json:1: not JSON: .*; expected one JSON object a line, or one JSON array of them",
    "[" * 100_000: "not JSON",
    '{"a":' * 100_000: "not JSON",
    '{"text": ' + "9" * 5000 + "}": r"d\.json:1: not JSON",
}


@pytest.mark.parametrize("text", BROKEN, ids=lambda text: text[:20])
def test_what_is_wrong_in_a_file_is_named_with_its_line(tokenizer, tmp_path, text):
    path = tmp_path / "d.json"
    path.write_text(text)
    with pytest.raises(DataError, match=BROKEN[text]):
        load_dataset(path, tokenizer, CFG)


def test_what_is_no_file_or_no_data(tokenizer, tmp_path):
    (tmp_path / "latin.json").write_bytes(b'[{"text": "\xe9"}]')
    (tmp_path / "half.json").write_bytes(codecs.BOM_UTF16_LE + b"{")
    for data, message in (
        (tmp_path, "a folder, expected a file"),
        (tmp_path / ("a" * 300), "File name too long"),
        (tmp_path / "latin.json", r"latin\.json: not UTF-8"),
        (tmp_path / "half.json", r"half\.json: not UTF-16"),
        ({"train": ROWS}, r"data: got dict with keys \['train'\], expected .* as one split of a DatasetDict is"),
        ("", "data: got '', expected a file of JSON lines"),
        (5, "data: got int, expected a file of JSON lines, or a list or other iterable of records"),
        (b"ab", "data: got bytes"),
        (["a"], r"data\[0\]: got str, expected a JSON object"),
        ((row for row in ()), "data: no records"),
    ):
        with pytest.raises(DataError, match=message):
            load_dataset(data, tokenizer, CFG)


def test_records_without_an_answer_are_left_out_and_counted(tokenizer):
    """Alpaca's 52,002 records hold some whose output is empty: one of them ended it all."""
    asked, nothing, answered = (
        {"role": role, "content": text} for role, text in (("user", "a"), ("assistant", ""), ("assistant", "b"))
    )
    empty = [
        {"instruction": "a", "output": ""},
        {"prompt": "a", "completion": ""},
        {"question": "a", "answer": ""},
        {"text": ""},
    ]
    chats = [  # whose one answer is that there is nothing to say: they learn its end
        {"messages": [asked, nothing]},
        {"messages": [asked, {**answered, "weight": 0}, asked, nothing]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]},
        {"prompt": [asked, answered, asked], "completion": [nothing]},
    ]
    data = load_dataset([*empty, *chats, *ROWS], tokenizer, CFG)
    assert len(data) == 2 + len(chats) and data.left_out == {"num_empty": 4}
    for sample in data.samples[: len(chats)]:
        assert np.flatnonzero(sample.weights).tolist() == [len(sample.weights) - 1]
    for record in ({"completion": ""}, {"prompt": 3, "completion": ""}, {"prompt": [], "completion": ""}):
        with pytest.raises(DataError, match=r"data\[0\]: "):
            load_dataset([record, *ROWS], tokenizer, CFG)
    with pytest.raises(DataError, match="none of 4 records is left: 0 too long, 4 without an answer"):
        load_dataset(empty, tokenizer, CFG)
    (one,) = load_dataset([{"messages": [asked, nothing, asked, answered]}], tokenizer, CFG).samples
    (other,) = load_dataset([{"messages": [asked, {**nothing, "weight": 0}, asked, answered]}], tokenizer, CFG).samples
    assert one.weights.tolist() == other.weights.tolist()


def test_a_long_text_is_no_reason_for_the_tokenizer_to_warn(tokenizer, monkeypatch):
    """It knows nothing of max_length: its own limit is that of another library's model."""
    monkeypatch.setattr(tokenizer, "model_max_length", 2)
    chat = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "def"}]
    load_dataset([{"text": "abcdef"}, {"prompt": "abc", "completion": "def"}, {"messages": chat}], tokenizer, CFG)
    encode_prompt(tokenizer, chat)
    assert not tokenizer.deprecation_warnings


IDS = [5, 6, 7, 8, 9]
CUT = [5, 6, 7, 8, 0]
TOKENIZED = {
    "ids alone": ({"input_ids": IDS}, IDS, [1, 1, 1, 1]),
    "labels": ({"input_ids": IDS, "labels": [-100, -100, 7, 8, -100]}, CUT, [0, 1, 1, 0]),
    "completion mask": ({"input_ids": IDS, "completion_mask": [0, 0, 0, 1, 1]}, IDS, [0, 0, 1, 1]),
    "assistant mask and labels": (
        {"input_ids": IDS, "labels": [5, 6, 7, 8, -100], "assistant_masks": [0, 1, 0, 1, 1]}, CUT, [1, 0, 1, 0],
    ),
    "padding on the right": ({"input_ids": [*IDS, 0, 0], "attention_mask": [1] * 5 + [0] * 2}, IDS, [1, 1, 1, 1]),
    "padding on the left": (
        {"input_ids": [0, *IDS], "attention_mask": [0] + [1] * 5, "labels": [-100, *IDS]}, IDS, [1, 1, 1, 1],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TOKENIZED)
@pytest.mark.parametrize("convert", [list, np.asarray, lambda ids: [np.int64(i) for i in ids]])
def test_records_of_token_ids(case, convert):
    record, ids, weights = TOKENIZED[case]
    (sample,) = load_dataset([{k: convert(v) for k, v in record.items()}], None, CFG, vocab_size=10).samples
    assert [*sample.tokens.tolist(), int(sample.targets[-1])] == ids
    assert sample.weights.tolist() == weights
    every = TrainConfig(pack_tokens=64, completion_only_loss=False)
    (sample,) = load_dataset([record], None, every).samples
    labels = record.get("labels", IDS)  # masks do not count then, labels do
    assert sample.weights.tolist() == [float(label != -100) for label in labels[-len(weights) :]]


def test_tensors_are_as_good_as_lists():
    torch = pytest.importorskip("torch")
    (sample,) = load_dataset([{"input_ids": torch.tensor(IDS)}], None, CFG).samples
    assert sample.tokens.tolist() == IDS[:4]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"input_ids": "abc"}, "input_ids: got 'abc', expected a list of integers"),
        ({"input_ids": [1.5, 2.0]}, r"input_ids: got \[1.5, 2.0\]"),
        ({"input_ids": [[1, 2]]}, "input_ids: got"),
        ({"input_ids": [True, False]}, "input_ids: got"),
        ({"input_ids": [5]}, "nothing to learn"),
        ({"input_ids": []}, "nothing to learn: got 0 tokens"),
        ({"input_ids": IDS, "attention_mask": [0] * 5}, "nothing to learn: got 0 tokens, expected one"),
        ({"input_ids": IDS, "labels": [-100] * 5}, "nothing to learn: got 5 tokens, expected one .* label or mask"),
        ({"input_ids": [1, 2**40]}, "token ids: got"),
        ({"input_ids": [1, 2**70]}, "token ids: got"),
        ({"input_ids": [1, -1]}, "token ids: got"),
        ({"input_ids": IDS, "labels": [1]}, "labels: got 1 values, expected 5"),
        ({"input_ids": IDS, "labels": [5, 6, 7, 8, 8]}, r"labels\[4\]: got 8, expected 9 as in input_ids, or -100"),
        ({"input_ids": IDS, "attention_mask": [1, 0, 1, 1, 1]}, "attention_mask: got zeros between ones"),
        ({"input_ids": IDS, "position_ids": [0, 1, 0, 1, 2]}, "position_ids: got several samples in one record"),
        ({"text": "abc"}, "got text, expected input_ids: this engine has no tokenizer"),
    ],
)
def test_token_ids_that_are_none_are_named(record, message):
    with pytest.raises(DataError, match=rf"data\[1\]: .*{message}"):
        load_dataset([{"input_ids": IDS}, record], None, CFG)


def test_ids_outside_the_vocabulary_are_named_in_every_form(tokenizer, tmp_path):
    """As an input they were trained as the last row of the embedding, as a target they made the loss NaN."""
    size = len(tokenizer) - 1  # the tokenizer knows one token more than the model: <|assistant|>
    path = tmp_path / "d.jsonl"
    good, bad = {"text": "ab"}, {"text": "a<|assistant|>b"}
    path.write_text("\n".join(map(json.dumps, (good, good, bad))))
    expected = rf"got token id {size} \('<\|assistant\|>'\), expected ids in \[0, {size}\), the model's vocabulary"
    for data, where in (
        (path, r"d\.jsonl:3"),
        ([good, bad], r"data\[1\]"),
        ((one for one in (good, bad)), r"data\[1\]"),
        ([good, {"prompt": "a<|assistant|>", "completion": "b"}], r"data\[1\]"),
        ([good, {"prompt": "a", "completion": "<|assistant|>"}], r"data\[1\]"),
        ([{"input_ids": [1, size, 2]}], r"data\[0\]"),
    ):
        with pytest.raises(DataError, match=f"{where}: {expected}"):
            load_dataset(data, tokenizer, CFG, vocab_size=size)
    load_dataset(path, tokenizer, CFG, vocab_size=size + 1)


def sample(tokens=(1, 2), targets=(2, 3), weights=(1, 1), kind=np.int32):
    return Sample(np.asarray(tokens, kind), np.asarray(targets, kind), np.asarray(weights, np.float32))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (sample(tokens=(1, 9)), "got token id 9, expected"),
        (sample(targets=(9, 3)), "got token id 9, expected"),
        (sample(targets=(-100, 3), weights=(0, 1)), "got token id -100, expected"),
        (sample(tokens=(1.5, 2), kind=np.float32), "expected a Sample"),
        (sample(tokens=(1, 2, 3)), "expected a Sample"),
        (sample(weights=(1, np.nan)), "weights: got nan, expected"),
        (sample(weights=(1, -1)), "weights: got -1.0, expected a Sample whose weights are finite and not negative"),
        (sample(weights=(0, 0)), "2 rows with 0 targets"),
        ({"input_ids": IDS}, "expected a Sample"),
    ],
)
def test_a_dataset_built_elsewhere_is_checked_against_the_model(bad, message):
    with pytest.raises(DataError, match=rf"^made\[1\]: .*{message}"):
        load_dataset(Dataset("made", (sample(), bad)), None, CFG, vocab_size=9)


@pytest.mark.parametrize("learn", [[True], [True] * 4, [0, -1, 1], [1, "a", 1], [[1], [1, 1], [0]], True])
def test_a_sample_has_a_truth_value_for_each_token(learn):
    with pytest.raises(DataError, match=r"^sample: learn: got .* expected 3 booleans, one for each token id"):
        make_sample([1, 2, 3], learn)


def test_a_dataset_is_not_longer_than_max_length():
    data = Dataset("made", (make_sample(range(12), [True] * 12),))
    assert load_dataset(data, None, TrainConfig(max_length=12)) is data
    with pytest.raises(DataError, match=r"made\[0\]: got 11 rows .* at most max_length - 1 = 10 rows"):
        load_dataset(data, None, TrainConfig(max_length=11))


def test_what_needs_no_tokenizer_is_found_without_one(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n{"text": ""}\n{"input_ids": [1, 2]}\n{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"d\.jsonl:4: completion is missing"):
        check_records(path)
    check_records([*ROWS, {"text": ""}, {"input_ids": np.array([1, 2])}])
    with pytest.raises(DataError, match="no such file"):
        check_records(tmp_path / "none")
