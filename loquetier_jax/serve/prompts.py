"""Normalises the prompts of a call, and arguments given once or per prompt."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from loquetier_jax.sampling_params import refuse
from loquetier_jax.serve.tokenizer import Prompt
from loquetier_jax.token_ids import are_token_ids, plain_prompt

A = TypeVar("A")


def prompts_of(value: Any, name: str) -> list[Prompt]:
    """A list of prompts, each in a form that `encode_prompt` accepts, from one string or an iterable.

    Raises:
        RequestError: neither, or a single chat or token id list where a list of them is expected. The prompts
            themselves are not checked.
    """
    value = plain_prompt(value)
    if isinstance(value, str):
        return [value]
    several = isinstance(value, Iterable) and not isinstance(value, (Mapping, bytes, bytearray))
    refuse(several, name, value, "a string or a list of strings, token id lists or chats")
    prompts = [plain_prompt(one) for one in value]
    chat = bool(prompts) and all(isinstance(one, Mapping) and "role" in one for one in prompts)
    refuse(not chat, name, prompts, "a list of chats: [messages]")
    refuse(not prompts or not are_token_ids(prompts), name, prompts, "a list of token id lists: [ids]")
    return prompts


def one_each(value: A | Sequence[A], count: int, name: str, kinds: tuple[type, ...]) -> list[A]:
    """`value` repeated `count` times, or `value` itself if it is a sequence of `count` values.

    Raises:
        RequestError: neither one of `kinds` nor `count` values.
    """
    if isinstance(value, kinds):
        return [value] * count
    refuse(isinstance(value, Iterable), name, value, f"one, or one per prompt ({count})")
    values = list(value)
    refuse(len(values) == count, name, f"{len(values)} values", f"one, or one per prompt ({count})")
    return values
