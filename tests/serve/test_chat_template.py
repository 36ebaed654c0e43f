"""Messages to the form that templates get, and a template's arguments: taken as they come, or refused by name."""

import json
from datetime import datetime
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from loquetier_jax.serve.chat_template import ChatTemplate
from loquetier_jax.serve.messages import ChatError, normalize_messages

USER = {"role": "user", "content": "hi"}
TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
CALLS = "{% for c in messages[0].tool_calls %}{{ (c.function or c).arguments | tojson }}{% endfor %}"


def render(tokenizer: Any, template: str, *messages: Any, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> str:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    return ChatTemplate(tokenizer, **arguments).render(normalize_messages(messages))


def parts(*texts: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": text} for text in texts]}


def calling(arguments: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content | trim }}{% endfor %}",
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% endif %}{% endfor %}",
    ],
)
def test_text_parts_are_joined_for_every_template(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    assert render(tokenizer, template, parts("What ", "color?"), monkeypatch=monkeypatch) == "What color?"


@pytest.mark.parametrize(
    ("arguments", "want"),
    [('{"city": "Rome"}', {"city": "Rome"}), ({"n": np.int64(3)}, {"n": 3}), ("", {}), (None, {}), ("{}", {})],
)
def test_arguments_of_calls_are_objects(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, arguments: Any, want: Any
) -> None:
    nested = calling(arguments)
    bare = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": arguments}]}
    for message in (nested, bare):
        assert json.loads(render(tokenizer, CALLS, message, monkeypatch=monkeypatch)) == want


def test_keys_without_a_value_are_left_out() -> None:
    message = {"role": "assistant", "content": "x", "tool_calls": None, "refusal": None, "reasoning": "r"}
    want = {"role": "assistant", "content": "x", "reasoning": "r", "reasoning_content": "r", "thinking": "r"}
    assert normalize_messages([message, {**message, "tool_calls": []}]) == [want, want]


DEEP: list[Any] = []
for _ in range(5000):
    DEEP = [DEEP]
IMAGE = {"type": "image_url", "image_url": {"url": "x.png"}}
REFUSED_MESSAGES = {
    "no object": ("hi", r"m\[0\]: got 'hi'"),
    "no role": ({"content": "x"}, r"m\[0\]: got keys \['content'\], expected role and content"),
    "no content": ({"role": "user", "content": None}, r"m\[0\]: got keys \['role'\], expected role and content"),
    "role": ({"role": 1, "content": "x"}, r"m\[0\]\.role: got 1"),
    "content": ({"role": "user", "content": 3}, r"m\[0\]\.content: got 3, expected a string or a list of text parts"),
    "image": ({"role": "user", "content": [IMAGE]}, r"m\[0\]\.content\[0\]: got .*image_url.* reads text only"),
    "calls": ({"role": "assistant", "tool_calls": "f()"}, r"m\[0\]\.tool_calls: got 'f\(\)'"),
    "call": ({"role": "assistant", "tool_calls": [{"function": {}}]}, r"tool_calls\[0\]\.function: got \{\}"),
    "not JSON": (calling("{city"), r"tool_calls\[0\]\.function\.arguments: got '\{city', expected a JSON object"),
    "no object either": (calling("[1]"), r"arguments: got \[1\], expected a JSON object"),
    "function_call": ({**USER, "function_call": {"name": "f"}}, r"m\[0\]\.function_call: .*expected tool_calls"),
    "reasoning": ({**USER, "reasoning": [1]}, r"m\[0\]\.reasoning_content: got \[1\]"),
    "thing": ({**USER, "when": datetime(2024, 1, 1)}, r"m\[0\]\.when: got datetime.*expected what JSON can hold"),
    "key": ({**USER, 3: 4}, r"m\[0\]: got key 3"),
    "deep": ({**USER, "x": DEEP}, r"m\[0\]: nested too deep"),
}


@pytest.mark.parametrize("case", REFUSED_MESSAGES)
def test_messages_that_cannot_be_taken_are_named(case: str) -> None:
    message, expected = REFUSED_MESSAGES[case]
    with pytest.raises(ChatError, match=expected):
        normalize_messages([message], "m")


REFUSED_ARGUMENTS = {
    "tools": ({"tools": [{"name": "f"}]}, TURNS, "tools: got 1, expected none: the chat template has no place"),
    "no tools": ({"tools": ["f"]}, "{{ tools }}", r"tools: got \['f'\], expected a list of JSON schemas"),
    "unknown": ({"chat_template_kwargs": {"enable_thinkin": False}}, "{{ enable_thinking }}", "'enable_thinkin'"),
    "taken": ({"chat_template_kwargs": {"messages": []}}, TURNS, "chat_template_kwargs: got 'messages'"),
    "no object": ({"chat_template_kwargs": "x"}, TURNS, "chat_template_kwargs: got 'x', expected an object"),
    "syntax": ({}, "{% for %}", "the chat template cannot be read: "),
    "runtime": ({}, "{{ 1 // 0 }}", "messages: refused by the chat template: "),
    "none": ({}, None, "messages: got a chat, expected a prompt: the model folder has no chat template"),
}


@pytest.mark.parametrize("case", REFUSED_ARGUMENTS)
def test_arguments_that_a_template_has_no_place_for_are_named(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    arguments, template, expected = REFUSED_ARGUMENTS[case]
    with pytest.raises(ChatError, match=expected):
        render(tokenizer, template, USER, monkeypatch=monkeypatch, **arguments)


@pytest.mark.parametrize("more", [{"tool_calls": [{"name": "f", "arguments": {}}]}, {"reasoning_content": "r"}])
def test_what_a_template_would_leave_out_is_named(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    message, key = {"role": "assistant", "content": "x", **more}, next(iter(more))
    with pytest.raises(ChatError, match=rf"messages\[1\]\.{key}: the chat template has no place for it"):
        render(tokenizer, TURNS, USER, message, monkeypatch=monkeypatch)
    assert key in render(tokenizer, "{{ messages | tojson }}", USER, message, monkeypatch=monkeypatch)


def test_a_template_that_prints_the_date_prints_that_of_the_clock_it_is_given(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}{{ messages[0].content }}"
    given = {"monkeypatch": monkeypatch, "now": datetime(2031, 12, 24)}
    assert render(tokenizer, template, USER, **given) == "24 Dec 2031hi"
    today = (datetime.now(), render(tokenizer, template, USER, monkeypatch=monkeypatch), datetime.now())
    assert today[1] in {day.strftime("%d %b %Yhi") for day in (today[0], today[2])}


def test_the_template_for_tools_is_taken_where_a_folder_has_one(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = {"default": "{{ messages[0].content }}", "tool_use": "{{ messages[0].content }}, {{ tools | length }} tools"}
    assert render(tokenizer, both, USER, monkeypatch=monkeypatch) == "hi"
    assert render(tokenizer, both, USER, monkeypatch=monkeypatch, tools=[{"name": "f"}]) == "hi, 1 tools"
