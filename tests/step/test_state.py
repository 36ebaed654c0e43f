"""The device state has one writer: its own methods."""

import ast
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from loquetier_jax.step.state import DeviceState

ROOT = Path(__file__).parents[2]
FIELDS = {field.name for field in fields(DeviceState)}


def is_state(node: ast.expr) -> bool:
    """`state`, `anything.state`."""
    return getattr(node, "id", getattr(node, "attr", None)) == "state"


def targets(node: ast.AST) -> Iterator[ast.expr]:
    """What a statement assigns to or deletes, tuples taken apart, and what it indexes or reaches into."""
    found = [*getattr(node, "targets", []), getattr(node, "target", None), getattr(node, "optional_vars", None)]
    stack = [target for target in found if isinstance(target, ast.expr)]
    while stack:
        target = stack.pop()
        yield target
        stack += getattr(target, "elts", [])
        if isinstance(target, ast.Starred | ast.Subscript):
            stack.append(target.value)


def writes(source: str) -> set[int]:
    """Lines that assign a field of a device state."""
    lines = set()
    for node in ast.walk(ast.parse(source)):
        found = [target for target in targets(node) if isinstance(target, ast.Attribute) and target.attr in FIELDS]
        lines |= {target.lineno for target in found if is_state(target.value)}
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr" and is_state(node.args[0]):
            lines.add(node.lineno)
    return lines


def test_only_the_state_writes_its_fields() -> None:
    files = [file for folder in ("loquetier_jax", "examples", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    assert {str(file.relative_to(ROOT)): lines for file in files if (lines := writes(file.read_text()))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "self.state.kv = kv",
        "state.kv, (out, *engine.state.slots) = run(state)",
        "dx, state.grads[a:b] = run(state)",
        "state.pages[0]['qkv_proj'] += 1",
        "setattr(self.state, name, pages)",
        "for state.params in range(3): pass",
        "del state.slots",
    ],
)
def test_a_second_writer_would_be_seen(line: str) -> None:
    assert writes(line) == {1}
    assert not writes("kv = self.state.kv; serving.kv = 1; state = new_state()")
