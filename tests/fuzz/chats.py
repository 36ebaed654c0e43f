"""Conversations with their tools and template arguments, on the templates of several models; served and learnt."""

import copy
import random
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from loquetier_jax.errors import DataError, LoquetierError, RequestError
from loquetier_jax.serve.tokenizer import encode_prompt
from loquetier_jax.tiny.tokenizer import build_tokenizer
from loquetier_jax.train.formats import parse_record
from loquetier_jax.train.tokenize import tokenize
from tests.fuzz.mutate import json_value, mutate_tree, python_value
from tests.train.chats import CHATS, chat_tokenizer, tools_of

TEMPLATES = ("llama3_1", "qwen3", "gemma", "mistral")
NOW = datetime(2024, 7, 26)


class Chats:
    """A good conversation of which a message, the tools or the template's variables are damaged."""

    errors = (DataError, RequestError)

    def __init__(self, folder: Path) -> None:
        self._tokenizers = [build_tokenizer(), *map(chat_tokenizer, TEMPLATES)]
        self._good = [(one, chat) for one in self._tokenizers for chat in _chats() if _taken(one, chat)]

    def attempt(self, rng: random.Random) -> None:
        tokenizer, chat = rng.choice(self._good)
        key = rng.choice(["messages", "messages", *chat])
        value = python_value if rng.random() < 0.5 else json_value
        changed = {**copy.deepcopy(chat), key: mutate_tree(rng, chat[key], value)}
        ids = (_learn if rng.random() < 0.5 else _serve)(tokenizer, changed)
        vocab = len(tokenizer)
        assert len(ids) and all(type(i) is int and 0 <= i < vocab for i in ids)

    def traces(self) -> list[int]:
        """Adding tokens would change what all others get."""
        return [len(tokenizer) for tokenizer in self._tokenizers]


def _chats() -> Iterator[dict[str, Any]]:
    """Every conversation as a record of data."""
    for name, messages in CHATS.items():
        tools = tools_of(name)
        yield {"messages": messages} | ({"tools": tools} if tools else {})
    yield {"messages": CHATS["multi-turn"], "chat_template_kwargs": {"enable_thinking": False}}


def _learn(tokenizer: Any, chat: dict[str, Any]) -> Sequence[int]:
    """Its token ids in training."""
    ids, learn = tokenize(parse_record(chat, "chat"), tokenizer, completion_only=True, where="chat", now=NOW)
    assert len(ids) == len(learn)
    return ids


def _serve(tokenizer: Any, chat: dict[str, Any]) -> Sequence[int]:
    """Its token ids in serving."""
    rest = {key: value for key, value in chat.items() if key != "messages"}
    return encode_prompt(tokenizer, chat["messages"], len(tokenizer), **rest, now=NOW)


def _taken(tokenizer: Any, chat: dict[str, Any]) -> bool:
    """Whether a template has a place for all of a conversation."""
    try:
        return bool(_learn(tokenizer, chat) and _serve(tokenizer, chat))
    except LoquetierError:
        return False
