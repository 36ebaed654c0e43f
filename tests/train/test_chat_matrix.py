"""Real chat templates x conversations of every kind x {serve, train}: ids against transformers, answers as text."""

from datetime import datetime
from functools import cache
from typing import Any

import pytest

from loquetier_jax.errors import DataError, RequestError
from loquetier_jax.serve.tokenizer import encode_prompt
from loquetier_jax.train.formats import parse_record
from loquetier_jax.train.tokenize import tokenize
from tests.train.chats import CALL as CALLED
from tests.train.chats import CHATS, assistant, chat_tokenizer, tools_of, user

NOW = datetime(2024, 7, 26)
tokenizer_of = cache(chat_tokenizer)

EOT, IM, TURN = "<|eot_id|>", "<|im_end|>\n", "<end_of_turn>\n"
CALL = '{"name": "weather", "arguments": {"city": "Rome"}}'
EMPTY = "<think>\n\n</think>\n\n"
NO_REASONING = "reasoning_content: the chat template has no place for it"
LLAMA = {
    "single turn": f"Hello{EOT}",
    "multi-turn": f"Hello{EOT}Ciao{EOT}",
    "system": f"Hello{EOT}Ciao{EOT}",
    "no system": f"Hello{EOT}",
    "assistant first": f"Welcome{EOT}Hello{EOT}",
    "tools": f'{{"name": "weather", "parameters": {{"city": "Rome"}}}}{EOT}It is sunny.{EOT}',
    "thinking": DataError(NO_REASONING),
}
# Template -> conversation -> what is learnt, or why it is refused.
LEARNT: dict[str, dict[str, str | DataError]] = {
    "llama3_1": LLAMA,
    "llama3_2": LLAMA,
    "qwen2_5": {
        "single turn": f"Hello{IM}",
        "multi-turn": f"Hello{IM}Ciao{IM}",
        "system": f"Hello{IM}Ciao{IM}",
        "no system": f"Hello{IM}",
        "assistant first": f"Welcome{IM}Hello{IM}",
        "tools": f"<tool_call>\n{CALL}\n</tool_call>{IM}It is sunny.{IM}",
        "thinking": DataError(NO_REASONING),
    },
    "qwen3": {  # only the last answer has its thinking: it drops that of the others itself
        "single turn": f"{EMPTY}Hello{IM}",
        "multi-turn": f"Hello{IM}{EMPTY}Ciao{IM}",
        "system": f"Hello{IM}{EMPTY}Ciao{IM}",
        "no system": f"{EMPTY}Hello{IM}",
        "assistant first": f"Welcome{IM}{EMPTY}Hello{IM}",
        "tools": f"<tool_call>\n{CALL}\n</tool_call>{IM}{EMPTY}It is sunny.{IM}",
        "thinking": f"Hello{IM}<think>\nThey leave.\n</think>\n\nCiao{IM}",
    },
    "gemma": {
        "single turn": DataError("System role not supported"),
        "multi-turn": f"Hello{TURN}Ciao{TURN}",
        "system": DataError("System role not supported"),
        "no system": f"Hello{TURN}",
        "assistant first": DataError("roles must alternate"),
        "tools": DataError("tools: got 1, expected none: the chat template has no place for tools"),
        "thinking": DataError(NO_REASONING),
    },
    "mistral": {
        "single turn": " Hello</s>",
        "multi-turn": " Hello</s> Ciao</s>",
        "system": " Hello</s> Ciao</s>",  # it stands in the last question only
        "no system": " Hello</s>",
        "assistant first": DataError("roles must alternate"),
        "tools": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}, "id": "abcdefghi"}]</s>'
        " It is sunny.</s>",
        "thinking": DataError(NO_REASONING),
    },
}
MATRIX = [(name, chat) for name in LEARNT for chat in CHATS]


def reference(name: str, chat: str, messages: list[dict[str, Any]], **arguments: Any) -> list[int]:
    """The ids by transformers, which wants the arguments of calls as objects."""
    plain = [dict(m) for m in messages]
    for message in plain:
        if "tool_calls" in message:
            call = message["tool_calls"][0]
            message["tool_calls"] = [{**call, "function": {**call["function"], "arguments": {"city": "Rome"}}}]
    return tokenizer_of(name).apply_chat_template(
        plain, tools=tools_of(chat), return_dict=False, date_string="26 Jul 2024", **arguments
    )


@pytest.mark.parametrize(("name", "chat"), MATRIX)
def test_served(name: str, chat: str) -> None:
    question, expected = CHATS[chat][:-1], LEARNT[name][chat]
    arguments = {"tools": tools_of(chat), "now": NOW}
    if isinstance(expected, DataError):
        with pytest.raises(RequestError, match=str(expected)):
            encode_prompt(tokenizer_of(name), question, **arguments)
        return
    served = encode_prompt(tokenizer_of(name), question, **arguments)
    assert list(served) == reference(name, chat, question, add_generation_prompt=True)


@pytest.mark.parametrize(("name", "chat"), MATRIX)
def test_trained(name: str, chat: str) -> None:
    tokenizer, expected = tokenizer_of(name), LEARNT[name][chat]
    record = parse_record({"messages": CHATS[chat], "tools": tools_of(chat)}, "data[0]")
    if isinstance(expected, DataError):
        with pytest.raises(DataError, match=rf"data\[0\]: .*{expected}"):
            tokenize(record, tokenizer, completion_only=True, where="data[0]", now=NOW)
        return
    ids, learn = tokenize(record, tokenizer, completion_only=True, where="data[0]", now=NOW)
    assert ids == reference(name, chat, CHATS[chat])
    assert tokenizer.decode([i for i, one in zip(ids, learn, strict=True) if one]) == expected


SUNNY = {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": "sunny"}
DROPPED = {
    "developer": ("qwen2_5", [{"role": "developer", "content": "Be a pirate."}, user("Hi")], 0, "role 'developer'"),
    "its words stand elsewhere": ("qwen3", [{"role": "developer", "content": "Hi"}, user("Hi")], 0, "role 'developer'"),
    "function": ("qwen3", [user("Hi"), assistant("x"), {**SUNNY, "role": "function"}, user("?")], 2, "role 'function'"),
    "human": ("qwen2_5", [{"role": "human", "content": "Hello"}, user("Hi")], 0, "role 'human'"),
    **{
        f"beside calls, {name}": (
            name, [user("Hi"), assistant("Let me see", tool_calls=[CALLED]), SUNNY], 1,
            "role 'assistant' beside tool_calls",
        )
        for name in ("llama3_1", "mistral")
    },
}  # fmt: skip


@pytest.mark.parametrize("case", DROPPED)
def test_content_that_a_template_drops_is_refused(case: str) -> None:
    """It vanished without a word: a whole system prompt under the name that OpenAI has for it."""
    name, messages, i, said = DROPPED[case]
    expected = rf"messages\[{i}\].content: the chat template drops it \({said}\)"
    with pytest.raises(RequestError, match=f"^{expected}"):
        encode_prompt(tokenizer_of(name), messages)
    if all(message["role"] not in ("function", "human") for message in messages):  # roles that no record has
        record = parse_record({"messages": [*messages, assistant("So")]}, "data[0]")
        with pytest.raises(DataError, match=rf"^data\[0\]: {expected}"):
            tokenize(record, tokenizer_of(name), completion_only=True, where="data[0]")


@pytest.mark.parametrize("key", ["images", "audio", "videos"])
def test_what_the_model_cannot_see_is_refused(key: str) -> None:
    with pytest.raises(RequestError, match=rf"^messages\[0\].{key}: got \['a'\], expected none: the model reads text"):
        encode_prompt(tokenizer_of("qwen3"), [{**user("Hi"), key: ["a"]}])
    for record in ({"messages": [user("Hi"), assistant("x")]}, {"text": "a"}):
        with pytest.raises(DataError, match=rf"^data\[0\]: {key}: got \['a'\], expected none: the model reads text"):
            parse_record({**record, key: ["a"]}, "data[0]")
        parse_record({**record, key: []}, "data[0]")
