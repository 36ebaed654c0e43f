"""Keyword arguments from other libraries: accepted where they match what is done here anyway, otherwise refused.

A config class lists the arguments of PEFT, TRL, transformers or vLLM in a table of rules. An argument that means the
same as one of our fields becomes that field; one whose value requests nothing (`bias="none"`) is dropped; any other is
refused with a message that says what to use instead. Arguments in no table remain unexpected. Imports no jax.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import fields
from enum import Enum
from typing import Any, TypeVar

import numpy as np

from loquetier_jax.errors import ConfigError, LoquetierError, short

C = TypeVar("C")

Rule = Callable[[Any, Mapping[str, Any]], dict[str, Any] | str]
"""(value, our own arguments in the same call) -> equivalent fields, or the text after "expected" in the error."""

NOTHING: tuple[Any, ...] = (None, False, "", "none", [], (), {})  # values that leave a feature switched off


class Instead(dict[str, Any]):
    """Fields set by a rule that override the values given for them, which request nothing."""


def anything(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Rule for arguments that affect no result here: speed, memory, logging and workers of another runtime."""
    return {}


def only(*values: Any, why: str) -> Rule:
    """Rule for an argument that only accepts `values`, the behaviour implemented here; `why` ends the message."""
    expected = f"{' or '.join(map(repr, values))}: {why}"
    return lambda value, given: {} if _among(value, values) else expected


def absent(why: str) -> Rule:
    """Rule for an unsupported feature, which must be off; `why` says what to use instead."""
    return lambda value, given: {} if _among(value, NOTHING) else f"none: {why}"


def spelled(field: str, meanings: Mapping[Any, Any] | None = None, *, rest: str | None = None) -> Rule:
    """Rule for another name of `field`, or for other spellings of its values.

    Args:
        field: Our field.
        meanings: Their value -> ours; any other value is passed through.
        rest: If given, any other value is refused, with this as what was expected.
    """
    known = meanings or {}

    def rule(value: Any, given: Mapping[str, Any]) -> dict[str, Any] | str:
        if isinstance(value, (str, int, float, type(None))) and value in known:
            return {field: known[value]}
        return {field: value} if rest is None else rest

    return rule


def plain(value: Any) -> Any:
    """Unwraps enum members and numpy scalars to plain Python values."""
    if isinstance(value, Enum):
        return value.value
    return value.item() if isinstance(value, np.generic) else value


def borrowing(rules: Mapping[str, Rule], error: type[LoquetierError] = ConfigError) -> Callable[[type[C]], type[C]]:
    """Decorates a dataclass so that it also accepts the keyword arguments in `rules`.

    The class gains `borrowed`, the names of those arguments, and `in_own_words`, which translates keyword arguments to
    its own, for callers that merge them with others. Enums and numpy scalars reach its fields as plain values.

    Args:
        rules: Argument -> rule; a rule named like a field translates values of that field.
        error: Raised when an argument is refused.
    """

    def decorate(cls: type[C]) -> type[C]:
        own = cls.__init__
        names = frozenset(f.name for f in fields(cls))  # ty: ignore

        def in_own_words(given: Mapping[str, Any]) -> dict[str, Any]:
            return _translate(given, names, rules, error)

        @functools.wraps(own)
        def __init__(self: Any, **given: Any) -> None:
            own(self, **in_own_words(given))

        cls.__init__ = __init__
        cls.borrowed, cls.in_own_words = frozenset(rules) - names, staticmethod(in_own_words)  # ty: ignore
        return cls

    return decorate


def _translate(
    given: Mapping[str, Any], names: frozenset[str], rules: Mapping[str, Rule], error: type[LoquetierError]
) -> dict[str, Any]:
    """Translates `given` to the arguments of the class's own __init__."""
    values = {name: plain(value) for name, value in given.items()}
    found = {name: value for name, value in values.items() if name in names or name not in rules}
    source = {name: name for name in given}  # field -> the argument that set it
    for name in (n for n in values if n in rules):
        said = rules[name](values[name], found)
        if isinstance(said, str):
            raise error(f"{name}: got {short(values[name], 200)}, expected {said}")
        for field, value in said.items():
            other = source.setdefault(field, name)
            if other != name and not isinstance(said, Instead) and not _among(found[field], (value,)):
                both = f"{short(values[name], 200)} beside {other}={short(values[other], 200)}"
                raise error(f"{name}: got {both}, expected one of the two")
            found[field] = value
    return found


def _among(value: Any, values: tuple[Any, ...]) -> bool:
    """Membership by type and value, so that True is not 1 and arrays never match."""
    return any(type(value) is type(one) and value == one for one in values)
