"""Matches untrusted regular expressions, which come with adapters, in a bounded number of steps.

`re` may need exponential time for "(.*)*!", while holding the GIL. Here each node of a pattern maps the set of
positions where it may start to the set where it may end, as bits of an integer, so there is no backtracking. The parser
is that of `re`, so patterns mean the same as in PEFT.
"""

import re
import warnings
from collections.abc import Iterator
from functools import lru_cache
from re import _parser as parser  # the public alias, sre_parse, is deprecated and warns
from typing import Any

MAX_LENGTH = 10_000
"""Maximum number of characters in a pattern."""

Node = tuple[str, Any]
"""A node of a pattern: ("CHAR", accepted set), ("AT", anchor), ("BRANCH", ...), ("REPEAT", ...), ("ASSERT", ...)."""

_CHARS = ("LITERAL", "NOT_LITERAL", "ANY", "IN")
_CATEGORIES = {"DIGIT": str.isdecimal, "SPACE": str.isspace, "WORD": lambda c: c.isalnum() or c == "_"}


class Steps:
    """A budget of steps shared by several matches; `take` raises TimeoutError when it is exhausted."""

    def __init__(self, limit: int) -> None:
        self.left = self.limit = limit

    def take(self, count: int = 1) -> None:
        self.left -= count
        if self.left < 0:
            raise TimeoutError(f"matching takes more than {self.limit:,} steps")


@lru_cache(1024)
def parse(pattern: str) -> tuple[Node, ...]:
    """The top-level nodes of a pattern, in order.

    Raises:
        ValueError: not a regular expression, too long, flags, or a construct that cannot be matched in bounded time
            (a backreference, an atomic group).
    """
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"it has {len(pattern)} characters, more than {MAX_LENGTH}")
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of sets like [[a]
            tree = parser.parse(pattern)
        if tree.state.flags != re.UNICODE.value:
            raise ValueError("flags such as (?i) are not supported")
        return tuple(_supported(tree))
    except (re.error, OverflowError) as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("its groups are nested too deeply") from None


def _supported(tree: Any) -> Iterator[Node]:
    """Converts a tree from re's parser to plain tuples, recursively."""
    for op, arg in tree:
        kind = str(op)
        if kind in _CHARS:
            yield "CHAR", (kind, tuple(arg) if kind == "IN" else arg)
        elif kind in ("AT", "FAILURE"):
            yield kind, str(arg)
        elif kind == "BRANCH":
            yield "BRANCH", [tuple(_supported(branch)) for branch in arg[1]]
        elif kind == "SUBPATTERN" and not arg[1] and not arg[2]:
            yield from _supported(arg[3])
        elif kind in ("MAX_REPEAT", "MIN_REPEAT"):
            yield "REPEAT", (int(arg[0]), int(arg[1]), tuple(_supported(arg[2])))
        elif kind in ("ASSERT", "ASSERT_NOT"):
            yield "ASSERT", (kind == "ASSERT", arg[0] > 0, tuple(_supported(arg[1])))
        else:
            what = {"SUBPATTERN": "an inline flag", "GROUPREF": "a backreference"}
            raise ValueError(f"{what.get(kind, kind.lower().replace('_', ' '))} is not supported")


def fullmatch(pattern: str, text: str, steps: Steps, starts: int = 1) -> bool:
    """Whether the whole of `text` matches, as `re.fullmatch` sees it.

    Args:
        pattern: See `parse`.
        text: A module's name.
        steps: The budget; each node of the pattern that is tried takes one step.
        starts: Bit i is set if the match may start at position i.

    Raises:
        ValueError: see `parse`.
        TimeoutError: the budget is exhausted.
    """
    return bool(_sequence(parse(pattern), _places(text), starts, steps) >> len(text))


class _Places:
    """Positions in one text; sets of them are integers, bit i for the position before character i."""

    def __init__(self, text: str) -> None:
        self.chars: dict[str, int] = {}  # character -> positions before it
        for place, char in enumerate(text):
            self.chars[char] = self.chars.get(char, 0) | 1 << place
        last, self.count = 1 << len(text), len(text) + 1
        word = sum(places for char, places in self.chars.items() if _CATEGORIES["WORD"](char))
        edges = word ^ word << 1
        self.at = {"AT_BEGINNING": 1, "AT_BEGINNING_STRING": 1, "AT_END_STRING": last}
        self.at |= {"AT_END": last | (last >> 1 if text.endswith("\n") else 0)}
        self.at |= {"AT_BOUNDARY": edges, "AT_NON_BOUNDARY": ~edges}

    def before(self, kind: str, arg: Any, steps: Steps) -> int:
        """The positions before a character that this node accepts."""
        if kind == "LITERAL":
            return self.chars.get(chr(arg), 0)
        if kind == "ANY":
            return ~self.chars.get("\n", 0) & (1 << self.count - 1) - 1
        steps.take(len(self.chars))
        return sum(places for char, places in self.chars.items() if _accepts(kind, arg, char))


_places = lru_cache(1024)(_Places)


def _sequence(nodes: tuple[Node, ...], places: _Places, starts: int, steps: Steps) -> int:
    """Positions where the sequence of `nodes` may end."""
    for kind, arg in nodes:
        if not starts:
            break
        steps.take()
        if kind == "CHAR":
            starts = (starts & places.before(*arg, steps)) << 1
        elif kind == "REPEAT":
            starts = _repeat(*arg, places, starts, steps)
        elif kind == "BRANCH":
            before, starts = starts, 0
            for branch in arg:
                starts |= _sequence(branch, places, before, steps)
        elif kind == "AT":
            starts &= places.at[arg]
        elif kind == "ASSERT":
            starts = sum(1 << i for i in range(places.count) if starts >> i & 1 and _holds(*arg, places, i, steps))
        else:  # (?!), which never matches
            starts = 0
    return starts


def _repeat(least: int, most: int, nodes: tuple[Node, ...], places: _Places, starts: int, steps: Steps) -> int:
    # More rounds than there are positions reach no new ones.
    for _ in range(min(least, places.count)):
        before, starts = starts, _sequence(nodes, places, starts, steps)
        if starts in (0, before):
            break
    ends = new = starts
    for _ in range(min(most - least, places.count)):
        new = _sequence(nodes, places, new, steps) & ~ends
        if not new:
            break
        ends |= new
    return ends


def _holds(wanted: bool, ahead: bool, nodes: tuple[Node, ...], places: _Places, place: int, steps: Steps) -> bool:
    """Whether a lookahead or lookbehind assertion holds at a position."""
    if ahead:
        return bool(_sequence(nodes, places, 1 << place, steps)) == wanted
    return bool(_sequence(nodes, places, (2 << place) - 1, steps) >> place & 1) == wanted


def _accepts(kind: str, arg: Any, char: str) -> bool:
    """Whether a single-character node accepts `char`."""
    if kind in ("LITERAL", "NOT_LITERAL"):
        return (ord(char) == arg) == (kind == "LITERAL")
    if kind == "RANGE":
        return arg[0] <= ord(char) <= arg[1]
    if kind == "CATEGORY":
        _, *negated, name = str(arg).split("_")
        return _CATEGORIES[name](char) != bool(negated)
    negated = str(arg[0][0]) == "NEGATE"
    return any(_accepts(str(part), value, char) for part, value in arg[negated:]) != negated
