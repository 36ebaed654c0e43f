"""Snapshots and decisions as JSON lines: a run can be replayed through another policy or config."""

import dataclasses
import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from loquetier_jax.config import require
from loquetier_jax.schedule.types import Decision, Snapshot


def write(file: TextIO, snapshot: Snapshot, decision: Decision) -> None:
    """Appends one line."""
    line = {"snapshot": dataclasses.asdict(snapshot), "decision": dataclasses.asdict(decision)}
    file.write(json.dumps(line) + "\n")


def read(path: str | Path) -> Iterator[tuple[Snapshot, Decision]]:
    """Yields what `write` wrote.

    Raises:
        ConfigError: a line with unknown or missing keys, or with values that a class refuses.
    """
    with open(path) as file:
        for number, text in enumerate(file, 1):
            line = json.loads(text)
            require(
                isinstance(line, dict) and set(line) == {"snapshot", "decision"},
                f"{path}:{number}",
                line,
                "the keys snapshot and decision",
            )
            yield _build(Snapshot, line["snapshot"]), _build(Decision, line["decision"])


def _build(hint: Any, value: Any) -> Any:
    """Plain JSON data to the type that `hint` says: dataclasses, tuples of them, optional ones."""
    if typing.get_origin(hint) is types.UnionType:
        inner = next(a for a in typing.get_args(hint) if a is not type(None))
        return None if value is None else _build(inner, value)
    if typing.get_origin(hint) is tuple:
        args = typing.get_args(hint)
        if args[-1] is Ellipsis:
            return tuple(_build(args[0], v) for v in value)
        return tuple(_build(a, v) for a, v in zip(args, value, strict=True))
    if dataclasses.is_dataclass(hint):
        types_of = typing.get_type_hints(hint)
        hints = {f.name: types_of[f.name] for f in dataclasses.fields(hint)}
        require(set(value) == set(hints), hint.__name__, sorted(value), f"the keys {sorted(hints)}")
        return hint(**{name: _build(hints[name], v) for name, v in value.items()})
    return value
