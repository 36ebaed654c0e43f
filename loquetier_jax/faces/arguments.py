"""Arguments of the calls: one of another type is refused by its name, before anything trips over it."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from loquetier_jax.errors import LoquetierError
from loquetier_jax.serve.params import refuse
from loquetier_jax.serve.tokenizer import Prompt

A = TypeVar("A")


def path_of(value: Any, name: str, expected: str, error: type[LoquetierError]) -> Path:
    """A path given as text or as a path; otherwise raises `error`, naming the argument."""
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(path, str) or not path:
        raise error(f"{name}: got {value!r:.200}, expected the path of {expected}")
    return Path(path)


def prompts_of(value: Any, name: str) -> list[Prompt]:
    """Prompts given as one text, or one by one.

    Raises:
        RequestError: neither; what the prompts themselves are is not looked at.
    """
    if isinstance(value, str):
        return [value]
    several = isinstance(value, Iterable) and not isinstance(value, (Mapping, bytes, bytearray))
    refuse(several, name, value, "one text, or a list of texts, token id lists or chats")
    return list(value)


def one_each(value: A | Sequence[A], count: int, name: str, kinds: tuple[type, ...]) -> list[A]:
    """`value` for each of `count` prompts, or the sequence it is already.

    Raises:
        RequestError: neither one of `kinds` nor `count` values.
    """
    if isinstance(value, kinds):
        return [value] * count
    refuse(isinstance(value, Iterable), name, value, f"one, or one per prompt ({count})")
    values = list(value)
    refuse(len(values) == count, name, f"{len(values)} values", f"one, or one per prompt ({count})")
    return values
