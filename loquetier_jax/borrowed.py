"""Arguments that people know from other libraries: taken where they ask for what is done anyway, else refused.

A config class lists those of PEFT, TRL, transformers or vLLM in a table of rules. One that means the same as a field of
ours becomes that field; one whose value asks for nothing (`bias="none"`) is dropped; every other one is refused in a
sentence that says what to use instead. What is in no table stays an unexpected keyword argument. Imports no jax.
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
"""(value, our own arguments beside it) -> the fields that say the same, or what was expected: the end of an error."""

NOTHING: tuple[Any, ...] = (None, False, "", "none", [], (), {})  # how a feature that is not wanted is written


class Instead(dict[str, Any]):
    """Fields that a rule says although they are given: what was given for them asks for nothing."""


def anything(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The rule of what decides no number here: speed, memory, logs and workers of another runtime."""
    return {}


def only(*values: Any, why: str) -> Rule:
    """The rule of an argument of which these values alone are what is done here; `why` ends the sentence."""
    expected = f"{' or '.join(map(repr, values))}: {why}"
    return lambda value, given: {} if _among(value, values) else expected


def absent(why: str) -> Rule:
    """The rule of a feature that is not here; `why` says what to use instead."""
    return lambda value, given: {} if _among(value, NOTHING) else f"none: {why}"


def spelled(field: str, meanings: Mapping[Any, Any] | None = None, *, rest: str | None = None) -> Rule:
    """The rule of another name for `field`, or of other words for its values.

    Args:
        field: Of ours.
        meanings: Their value -> ours; a value that is not among them stays as it is.
        rest: Refuses such a value instead: what was expected.
    """
    known = meanings or {}

    def rule(value: Any, given: Mapping[str, Any]) -> dict[str, Any] | str:
        if isinstance(value, (str, int, float, type(None))) and value in known:
            return {field: known[value]}
        return {field: value} if rest is None else rest

    return rule


def plain(value: Any) -> Any:
    """A member of an enum as its value, a number of numpy as Python's."""
    if isinstance(value, Enum):
        return value.value
    return value.item() if isinstance(value, np.generic) else value


def borrowing(rules: Mapping[str, Rule], error: type[LoquetierError] = ConfigError) -> Callable[[type[C]], type[C]]:
    """Decorates a dataclass whose keyword arguments may also be those of `rules`.

    The class gets `borrowed`, their names, and `in_own_words`, which turns arguments by name into its own, for callers
    that merge them with others. Enums and numpy numbers come to its fields as plain values.

    Args:
        rules: Argument -> rule; a rule under the name of a field gives other words for its values.
        error: What a refusal raises.
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
    """The arguments of a class's own __init__."""
    values = {name: plain(value) for name, value in given.items()}
    found = {name: value for name, value in values.items() if name in names or name not in rules}
    source = {name: name for name in given}  # field -> the argument that said it
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
    """Whether it is one of them; types count: True is not 1, and an array is compared with nothing."""
    return any(type(value) is type(one) and value == one for one in values)
