"""Every format against hand-written text and masks; every malformed line against its name and number."""

import json

import pytest

from loquetier_jax.errors import DataError
from loquetier_jax.train.config import TrainConfig
from loquetier_jax.train.data import load_dataset


def spell(tokenizer, record, **config):
    """(whole text, text of the learnt targets) of one record."""
    (sample,) = load_dataset([record], tokenizer, TrainConfig(**config)).samples
    whole = [int(sample.tokens[0])]
    for i in range(len(sample)):  # targets continue tokens wherever they are learnt
        following = int(sample.tokens[i + 1]) if i + 1 < len(sample) else int(sample.targets[i])
        assert sample.weights[i] in (0.0, 1.0)
        assert sample.targets[i] == (following if sample.weights[i] else 0)
        whole.append(following)
    learnt = [int(t) for t, w in zip(sample.targets, sample.weights, strict=True) if w]
    return tokenizer.decode(whole), tokenizer.decode(learnt)


USER = {"role": "user", "content": "hi"}
ASSISTANT = [{"role": "assistant", "content": "yo"}]
CASES = {
    "text": ({"text": "abc"}, "<bos>abc<eos>", "abc<eos>"),
    "text with eos": ({"text": "abc<eos>"}, "<bos>abc<eos>", "abc<eos>"),
    "completion": ({"prompt": "2+2=", "completion": "4"}, "<bos>2+2=4<eos>", "4<eos>"),
    "empty prompt": ({"prompt": "", "completion": "4"}, "<bos>4<eos>", "4<eos>"),
    "unicode": ({"prompt": "é", "completion": "ü"}, "<bos>éü<eos>", "ü<eos>"),
    "gsm8k": (
        {"question": "1+1?", "answer": "2\n#### 2"},
        "<bos>Question: 1+1?\nAnswer: 2\n#### 2<eos>",
        "2\n#### 2<eos>",
    ),
    "alpaca": (
        {"instruction": "Say hi", "input": "", "output": "hi", "text": "redundant"},
        "<bos>Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\n\n### Instruction:\nSay hi\n\n### Response:\nhi<eos>",
        "hi<eos>",
    ),
    "alpaca input": (
        {"instruction": "Add", "input": "1 2", "output": "3"},
        "<bos>Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd\n\n"
        "### Input:\n1 2\n\n### Response:\n3<eos>",
        "3<eos>",
    ),
    "chat": (
        {"messages": [{"role": "system", "content": "S"}, USER, {"role": "assistant", "content": "yo"}]},
        "<|system|>S<eot><|user|>hi<eot><|assistant|>yo<eot>",
        "yo<eot>",
    ),
    "chat weights": (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": "a", "weight": 0},
                USER,
                {"role": "assistant", "content": "b", "weight": 1},
            ]
        },
        "<|user|>hi<eot><|assistant|>a<eot><|user|>hi<eot><|assistant|>b<eot>",
        "b<eot>",
    ),
    "two turns": (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": "a"},
                USER,
                {"role": "assistant", "content": "b"},
            ]
        },
        "<|user|>hi<eot><|assistant|>a<eot><|user|>hi<eot><|assistant|>b<eot>",
        "a<eot>b<eot>",
    ),
    "text parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "yo"}]},
            ]
        },
        "<|user|>hi<eot><|assistant|>yo<eot>",
        "yo<eot>",
    ),
    "prompt messages": (
        {
            "prompt": [USER, {"role": "assistant", "content": "shot"}, USER],
            "completion": [{"role": "assistant", "content": "yo"}],
        },
        "<|user|>hi<eot><|assistant|>shot<eot><|user|>hi<eot><|assistant|>yo<eot>",
        "yo<eot>",
    ),
    "sharegpt": (
        {"id": "x", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
        "<|user|>hi<eot><|assistant|>yo<eot>",
        "yo<eot>",
    ),
    "sharegpt, marked": (
        {
            "system": "S",
            "tools": "[]",
            "conversations": [
                {"from": "human", "value": "hi", "train": False},
                {"from": "gpt", "value": "a", "weight": 0},
                {"from": "human", "value": "hi"},
                {"from": "gpt", "value": "b", "train": False},
                {"from": "human", "value": "hi"},
                {"from": "gpt", "value": "c", "train": True, "weight": None},
            ],
        },
        "<|system|>S<eot><|user|>hi<eot><|assistant|>a<eot><|user|>hi<eot><|assistant|>b<eot>"
        "<|user|>hi<eot><|assistant|>c<eot>",
        "c<eot>",
    ),
    "train": (
        {"messages": [USER, {"role": "assistant", "content": "a", "train": False}, USER, *ASSISTANT], "history": []},
        "<|user|>hi<eot><|assistant|>a<eot><|user|>hi<eot><|assistant|>yo<eot>",
        "yo<eot>",
    ),
    "system beside messages": (
        {"prompt": [USER], "completion": ASSISTANT, "system": "S"},
        "<|system|>S<eot><|user|>hi<eot><|assistant|>yo<eot>",
        "yo<eot>",
    ),
    "assistant first": (
        {"messages": [*ASSISTANT, USER, *ASSISTANT], "system": ""},
        "<|assistant|>yo<eot><|user|>hi<eot><|assistant|>yo<eot>",
        "yo<eot>yo<eot>",
    ),
    "alpaca without history": (
        {"instruction": "Say hi", "output": "hi", "system": "", "history": [], "tools": None},
        "<bos>Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\n\n### Instruction:\nSay hi\n\n### Response:\nhi<eos>",
        "hi<eos>",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_formats(tokenizer, case):
    record, whole, learnt = CASES[case]
    assert spell(tokenizer, record) == (whole, learnt)


def test_every_token_is_learnt_on_demand(tokenizer):
    record, whole, _ = CASES["completion"]
    assert spell(tokenizer, record, completion_only_loss=False) == (whole, whole.removeprefix("<bos>"))


def test_jsonl_equals_dicts(tokenizer, tmp_path):
    records = [record for record, _, _ in CASES.values()]
    path = tmp_path / "data.jsonl"
    path.write_text("\n\n".join(json.dumps(r) for r in records) + "\n")
    cfg = TrainConfig()
    assert load_dataset(path, tokenizer, cfg).fingerprint == load_dataset(records, tokenizer, cfg).fingerprint
    assert (
        load_dataset(records[1:], tokenizer, cfg).fingerprint
        != load_dataset(records, tokenizer, cfg).fingerprint
    )


def test_truncation_is_counted(tokenizer):
    data = load_dataset([{"text": "a" * 50}, {"text": "b"}], tokenizer, TrainConfig(max_length=10))
    assert data.num_truncated == 1
    assert [len(s) for s in data.samples] == [9, 2]
    with pytest.raises(DataError, match=r"data\[0\].*max_length = 10"):
        load_dataset([{"prompt": "a" * 50, "completion": "b"}], tokenizer, TrainConfig(max_length=10))


MALFORMED = {
    "{": "not JSON",
    "[1]": "JSON object",
    '{"foo": 1}': "foo",
    '{"text": 3}': "text",
    '{"prompt": "a", "completion": 3}': "two strings",
    '{"prompt": "a"}': "completion is missing",
    '{"prompt": "a", "completion": ["b"]}': "two strings or two lists",
    '{"instruction": "a"}': "output",
    '{"question": "a"}': "answer",
    '{"messages": []}': "non-empty",
    '{"messages": [{"role": "robot", "content": "x"}]}': r"messages\[0\].role",
    '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}': "text",
    '{"messages": [{"role": "assistant", "content": "x", "weight": 2}]}': "weight",
    '{"messages": [{"role": "user", "content": "x", "weight": 1}]}': "weight",
    '{"messages": [{"role": "user", "content": "x"}]}': "nothing to learn",
    '{"conversations": [{"from": "dog", "value": "x"}]}': r"conversations\[0\]",
    '{"conversations": [{"from": "gpt"}]}': r"conversations\[0\]",
    '{"conversations": [{"from": "gpt", "value": "x", "train": 1}]}': r"conversations\[0\].train: got 1",
    '{"messages": [{"role": "user", "content": "x", "train": true}]}': r"messages\[0\].train: got True",
    '{"messages": [{"role": "assistant", "content": "x", "train_detail": []}]}': "train_detail: not supported",
    '{"messages": [{"role": "system", "content": "x"}], "system": "y"}': "system: got 'y' and a system message",
    '{"messages": [{"role": "assistant", "content": "x"}], "system": ["y"]}': "system: got .*expected a string",
    '{"messages": [{"role": "assistant", "content": "x"}], "history": [["q", "a"]]}': "history: got",
    '{"messages": [{"role": "assistant", "content": "x"}], "tools": "{"}': "tools: got '{', expected a list",
    '{"messages": [{"role": "assistant", "content": "x"}], "tools": {"name": "f"}}': "tools: got .*expected a list",
    '{"messages": [{"role": "assistant", "content": "x"}], "chat_template_kwargs": [1]}': "chat_template_kwargs: got",
    '{"messages": [{"role": "assistant", "content": "x"}], "tools": [{"name": "f"}]}': "has no place for tools",
    '{"instruction": "a", "output": "b", "system": "s"}': "system: got 's' beside plain text",
    '{"instruction": "a", "output": "b", "history": [["q", "a"]]}': "history: got .*messages",
    '{"prompt": "a", "completion": "b", "tools": [{"name": "f"}]}': "tools: got .*messages",
    '{"text": "a", "system": "s"}': "system: got 's' beside plain text",
    '{"text": "a", "history": [["q", "a"]]}': "history: got .*messages",
    '{"input_ids": [1, 2], "system": "s"}': "system: got 's' beside input_ids",
    '{"messages": [{"role": "assistant", "content": "x"}], "train": false}': "train: got False for the whole record",
    '{"prompt": "a", "completion": "b", "weight": 0}': "weight: got 0 for the whole record, expected it on an assist",
    '{"question": "a", "answer": "b", "chat_template_kwargs": {"x": 1}}': "chat_template_kwargs: got .*messages",
}


@pytest.mark.parametrize("line", MALFORMED)
def test_malformed_lines_are_named(tokenizer, tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=rf"bad\.jsonl:3: .*{MALFORMED[line]}"):
        load_dataset(path, tokenizer, TrainConfig())


def test_missing_empty_and_undecodable_files(tokenizer, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_dataset(tmp_path / "none.jsonl", tokenizer, TrainConfig())
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no records"):
        load_dataset(tmp_path / "empty.jsonl", tokenizer, TrainConfig())
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    with pytest.raises(DataError, match=r"latin\.jsonl:1: not UTF-8"):
        load_dataset(tmp_path / "latin.jsonl", tokenizer, TrainConfig())


def test_records_may_set_variables_of_the_template(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template + "{{ 'ends' if enable_thinking }}")
    record = {"messages": [USER, *ASSISTANT], "chat_template_kwargs": {"enable_thinking": True}}
    assert spell(tokenizer, record)[1] == "yo<eot>ends"
    assert spell(tokenizer, {**record, "chat_template_kwargs": None})[1] == "yo<eot>"


def test_template_that_rewrites_history_is_refused(tokenizer, monkeypatch):
    # like templates that drop the reasoning of earlier turns
    template = "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else 'x' }}<eot>{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    record = CASES["two turns"][0]
    with pytest.raises(DataError, match=r"data\[0\]: messages\[1\].content: the chat template drops it"):
        load_dataset([record], tokenizer, TrainConfig())
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system role') }}")
    with pytest.raises(DataError, match="no system role"):
        load_dataset([record], tokenizer, TrainConfig())
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(DataError, match="chat template"):
        load_dataset([record], tokenizer, TrainConfig())
