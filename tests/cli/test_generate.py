"""`loquetier generate` gives what the Python API gives, in every form it can be asked for."""

import argparse
import io
import json
import sys
from pathlib import Path

import pytest

from loquetier_jax import Engine, SamplingParams
from loquetier_jax.cli import generate, main
from loquetier_jax.presets import engine_config

GREEDY = SamplingParams(temperature=0, max_tokens=6)
PROMPTS = ("hello", "a longer prompt")


@pytest.fixture(scope="module")
def expected(model: Path, engine_yaml: Path, adapter: Path) -> dict[str | None, list[str]]:
    """Adapter -> texts of PROMPTS, from an engine of our own."""
    engine = Engine.from_pretrained(model, config=engine_config(str(engine_yaml)), progress=False)
    engine.load_adapter("a", adapter)
    texts = {n: [o.outputs[0].text for o in engine.generate(PROMPTS, n, GREEDY)] for n in (None, "a")}
    assert texts[None] != texts["a"]
    return texts


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_every_prompt_through_every_adapter_as_json(
    options: list[str], adapter: Path, expected: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["--adapter", "base", "--adapter", f"a={adapter}", "--max-tokens", "6", "--json"]
    assert main(["generate", *PROMPTS, *chosen, *options]) == 0
    found = lines(capsys.readouterr().out)
    assert [(f["prompt"], f["adapter"]) for f in found] == [(p, n) for p in PROMPTS for n in (None, "a")]
    for i, one in enumerate(found):
        assert one["outputs"][0]["text"] == expected[one["adapter"]][i // 2]
        assert one["outputs"][0]["finish_reason"] in ("length", "stop")
        assert one["prompt_tokens"] == len(one["prompt"]) + 1
        assert 0 < one["ttft_ms"] <= one["e2el_ms"]


def test_text_from_stdin_streams(
    options: list[str],
    expected: dict,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert main(["generate", "--max-tokens", "6", *options]) == 0
    shown = capsys.readouterr()
    assert shown.out == expected[None][0] + "\n"
    assert "ready in" in shown.err


def test_jsonl_file_with_its_own_parameters(
    options: list[str], adapter: Path, expected: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        {"prompt": "hello", "max_tokens": 6, "adapter": "a"},
        {"prompt": [104, 105], "max_tokens": 3, "logprobs": 2, "ignore_eos": True},
        {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {}, "temperature": 1.0, "n": 2},
    ]
    path = tmp_path / "asked.jsonl"
    path.write_text("\n".join(map(json.dumps, asked)))
    named = ["--adapter", f"a={adapter}", "--max-tokens", "6"]
    assert main(["generate", "--file", str(path), *named, "--json", *options]) == 0
    first, second, third = lines(capsys.readouterr().out)
    assert first["outputs"][0]["text"] == expected["a"][0]
    assert len(second["outputs"][0]["token_ids"]) == 3
    assert all(len(one) >= 2 for one in second["outputs"][0]["logprobs"])
    assert [o["index"] for o in third["outputs"]] == [0, 1]
    assert third["prompt_tokens"] > 2


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "1: not JSON"),
        ('{"text": "a"}', "1: got"),
        ('{"prompt": "a", "top_q": 1}', "top_q"),
        ('{"prompt": "a", "messages": []}', "1: got prompt and messages"),
        ('{"messages": [5]}', "1: messages: got [5], expected a list of objects with role and content"),
        ('{"messages": []}', "1: messages: got []"),
        ('{"messages": "hi"}', "1: messages: got 'hi'"),
        ('{"messages": [{"role": "user"}]}', "1: messages: got"),
        ('{"prompt": [{"role": "user"}, 5]}', "1: prompt: got"),
        ('{"prompt": [1.5]}', "1: prompt: got [1.5], expected text, token ids or chat messages"),
        ('{"prompt": null}', "1: prompt: got None"),
        ('{"prompt": "a", "adapter": ["b"]}', "1: adapter: got ['b'], expected a name or null"),
    ],
)
def test_a_malformed_line_is_named(line: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text(line)
    assert main(["generate", "--file", str(path)]) == 2
    assert named in capsys.readouterr().err


def test_files_as_they_come_and_other_names_of_the_same(tmp_path: Path) -> None:
    """One JSON array, the byte order mark of Windows, and arguments under the names of transformers and OpenAI."""
    args = argparse.Namespace(prompt=[], max_tokens=128, temperature=0.0, top_p=1.0, seed=None, stop=[])
    args.sampling = ["max_new_tokens=9"]
    defaults = generate.sampling_of(args)
    for name, content in (
        ("a.json", b'[{"prompt": "a"},\n {"prompt": [65, 66], "max_completion_tokens": 5}]'),
        ("a.jsonl", b'\xef\xbb\xbf{"prompt": "a"}\n{"prompt": [65, 66], "max_tokens": 5}'),
    ):
        (tmp_path / name).write_bytes(content)
        args.file = str(tmp_path / name)
        lines = generate.prompts_of(args)
        first, second = (one for line in lines for one in generate.asked_by(line, ["base"], defaults, chat=False))
        assert (first.prompt, first.params.max_tokens) == ("a", 9)
        assert (second.prompt, second.params.max_tokens) == ([65, 66], 5)
    args.file = str(tmp_path / "a.txt")
    Path(args.file).write_bytes(b"\xef\xbb\xbfa\nb\n")
    assert generate.prompts_of(args) == [{"prompt": "a"}, {"prompt": "b"}]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ({"prompt": "a", "adapter": "b"}, "adapter: got 'b', expected one that --adapter loads: ['base']"),
        ({"prompt": [5] * 100_000}, "max_tokens: got 128 beside 100000 tokens of prompt or more"),
        ({"prompt": "a", "top_logprobs": 2}, "1: top_logprobs: got 2, expected None: use logprobs"),
        ({"prompt": "a", "max_tokens": 3, "max_new_tokens": 4}, "1: max_new_tokens: got 4 beside max_tokens=3"),
    ],
)
def test_what_no_model_could_answer_is_refused_before_one_is_loaded(
    line: dict, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text(json.dumps(line))
    assert main(["generate", "--file", str(path), "--model", str(tmp_path)]) == 2
    assert named in capsys.readouterr().err


def test_refused_by_the_engine(
    options: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "x" * 200, "--max-tokens", "6", *options]) == 2
    assert "max_model_len 128" in capsys.readouterr().err
    assert main(["generate", "x", "--adapter", f"a={tmp_path}", *options]) == 2
    assert "loquetier: error" in capsys.readouterr().err


def test_lines_of_a_file_end_where_json_says(tmp_path: Path) -> None:
    """U+2028 is no end of a line, and the keys of a JSON object are strings."""
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a\u2028b", "logit_bias": {"65": 2}}, ensure_ascii=False) + "\n", "utf-8")
    args = argparse.Namespace(prompt=[], file=str(path))
    [line] = generate.prompts_of(args)
    [asked] = generate.asked_by(line, ["base"], {}, chat=False)
    assert asked.prompt == "a\u2028b" and asked.params.logit_bias == {65: 2}
