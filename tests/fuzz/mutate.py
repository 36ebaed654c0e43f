"""Seeded mutations of what comes from outside: bytes, files, JSON trees and Python values. A generator decides all."""

import copy
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

DEEP = 3000  # levels: more than Python recurses
HUGE = 10**400  # no float holds it
ENDLESS = 10**5000  # and Python writes no int of so many digits


def nested(depth: int = DEEP, *, as_dict: bool = False) -> Any:
    """A list in a list in a list, or an object in an object in an object."""
    value: Any = []
    for _ in range(depth):
        value = {"a": value} if as_dict else [value]
    return value


NUMBERS = (0, 1, -1, 2, 3, 255, 256, 2**31 - 1, 2**31, 2**32, 2**63, -(2**63), HUGE, 0.0, -0.0, 0.5, 1.0, 1.5, -1.5)
NUMBERS += (5e-324, 1e-6, 1e38, 1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = ("", " ", "x", "\x00", "\ud800", "\udc00x", "a\ud83d", "é", "e\u0301", "\u202e", "\ufeff", "\ufffd")
TEXTS += ("\U0010ffff", "<|end|>", "<|im_start|>", "{{ x }}", "{% if %}", "{0}", "%s", "1", "null")
TEXTS += ("[1]", '{"a": 1}', "\n" * 50, "../..", "/", "(", "(.*)*!", "[", "word " * 300)
JSON_VALUES = (None, True, False, *NUMBERS, *TEXTS, [], {}, [[]], [None], [{}], {"": 1}, {"a": {}}, [1, "x"], [True])
"""What JSON can hold where something else was expected."""

PYTHON_VALUES: tuple[Any, ...] = (
    *JSON_VALUES, ENDLESS, b"x", bytearray(b"x"), (), (1,), {1}, {1: 2}, {None: 1}, object(), len, range(3), 1j,
    Ellipsis, int, np.int64(3), np.uint64(2**64 - 1), np.float32("nan"), np.bool_(True), np.str_("x"),
    np.arange(3), np.ones((2, 2)), np.array("x"), np.array([None]), np.zeros(0, np.int32), np.datetime64("2024-01-01"),
)  # fmt: skip
"""And what a caller in Python may pass beside that."""


def json_value(rng: random.Random) -> Any:
    """Any of JSON_VALUES."""
    return copy.deepcopy(rng.choice(JSON_VALUES))


def python_value(rng: random.Random) -> Any:
    """Any of PYTHON_VALUES, or something nested deeper than Python recurses."""
    if rng.random() < 0.05:
        return nested(as_dict=rng.random() < 0.5)
    return copy.deepcopy(rng.choice(PYTHON_VALUES))


def mutate_tree(rng: random.Random, tree: Any, value: Callable[[random.Random], Any] = json_value) -> Any:
    """A copy of lists, dicts and leaves with one to three changes.

    Args:
        rng: Decides.
        tree: What is right.
        value: Makes what is put in place of something else.
    """
    root = {"": copy.deepcopy(tree)}
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = _places(root)
        if not places:
            break
        holder, key = rng.choice(places)
        rng.choice(_CHANGES)(rng, holder, key, value)
    return root.get("")


def _places(root: Any) -> list[tuple[Any, Any]]:
    """(holder, key or index) of the nodes of a tree."""
    places, open_ = [], [root]
    while open_ and len(places) < 500:
        holder = open_.pop()
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            places.append((holder, key))
            if isinstance(holder[key], (list, dict)):
                open_.append(holder[key])
    return places


def _drop(rng: random.Random, holder: Any, key: Any, value: Any) -> None:
    del holder[key]


def _duplicate(rng: random.Random, holder: Any, key: Any, value: Any) -> None:
    again = holder[key] if rng.random() < 0.5 else _copied(holder[key])
    if isinstance(holder, list):
        holder.insert(rng.randint(0, len(holder)), again)
    else:
        holder[rng.choice([*holder, "x"])] = again


def _swap(rng: random.Random, holder: Any, key: Any, value: Any) -> None:
    holder[key] = value(rng)


def _rename(rng: random.Random, holder: Any, key: Any, value: Any) -> None:
    if isinstance(holder, dict):
        holder[rng.choice(TEXTS)] = holder.pop(key)
    else:
        rng.shuffle(holder)


def _wrap(rng: random.Random, holder: Any, key: Any, value: Any) -> None:
    holder[key] = [holder[key]] if rng.random() < 0.5 else {"x": holder[key]}


def _alter(rng: random.Random, holder: Any, key: Any, value: Any) -> None:
    """Something of the same type, but for numbers, which may become floats."""
    old = holder[key]
    if isinstance(old, str):
        at = rng.randint(0, len(old))
        holder[key] = old[:at] + rng.choice(TEXTS) + old[at + rng.choice((0, 0, 1, 5)) :]
    elif isinstance(old, (int, float)):
        holder[key] = rng.choice(NUMBERS)
    elif isinstance(old, list):
        holder[key] = old * rng.choice((0, 2, 5))
    else:
        holder[key] = value(rng)


_CHANGES = (_drop, _duplicate, _swap, _swap, _rename, _wrap, _alter, _alter)


def _copied(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except RecursionError:
        return value


def json_text(rng: random.Random, tree: Any) -> bytes:
    """A tree as JSON: escaped, or with its characters as they are, halves of surrogate pairs included."""
    return json.dumps(tree, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")


_INSERTS = (b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"[", b"{", b'"', b",", b"\n", b"\r", b"\\ud800", b"NaN")
_INSERTS += (b"9" * 5000, b"[" * 100_000, b'{"a":' * 100_000, b"1e999", b"-", b"\xed\xa0\x80", b" " * 1000)


def mutate_bytes(rng: random.Random, raw: bytes) -> bytes:
    """Bytes flipped, cut, inserted, taken out, doubled; or none at all."""
    data, kind = bytearray(raw), rng.random()
    if kind < 0.4:
        for _ in range(rng.randint(1, 4) if data else 0):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind < 0.55:
        del data[rng.randint(0, len(data)) :]
    elif kind < 0.8:
        at = rng.randint(0, len(data))
        data[at:at] = rng.choice(_INSERTS)
    elif kind < 0.9:
        at = rng.randint(0, len(data))
        del data[at : at + rng.randint(1, 20)]
    elif kind < 0.97:
        at = rng.randint(0, len(data))
        data[at:at] = data[at : at + rng.randint(1, 200)]
    else:
        data.clear()
    return bytes(data)


def mutate_file(rng: random.Random, file: Path) -> None:
    """A file changed in its bytes, removed, or replaced by a folder or by a link to nothing."""
    kind = rng.random()
    if kind < 0.8:
        file.write_bytes(mutate_bytes(rng, file.read_bytes()))
        return
    file.unlink()
    if kind < 0.87:
        file.mkdir()
    elif kind < 0.9:
        file.symlink_to("nowhere")


def put(file: Path, raw: bytes) -> None:
    """Writes a file whatever a mutation has left in its place."""
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    elif file.is_symlink():
        file.unlink()
    file.write_bytes(raw)


def mutate_safetensors(rng: random.Random, raw: bytes) -> bytes:
    """A safetensors file changed in its header's JSON, its header's bytes, its numbers, or its length."""
    size, kind = 8 + int.from_bytes(raw[:8], "little"), rng.random()
    if kind < 0.4:
        header = json_text(rng, mutate_tree(rng, json.loads(raw[8:size])))
        return len(header).to_bytes(8, "little") + header + raw[size:]
    if kind < 0.6:
        return mutate_bytes(rng, raw[:size]) + raw[size:]
    return raw[:size] + mutate_bytes(rng, raw[size:]) if kind < 0.8 else mutate_bytes(rng, raw)


def mutate_ids(rng: random.Random, ids: Sequence[int]) -> Any:
    """Token ids with one that is none, outside the vocabulary or of another type; or in an array; or far too many."""
    kind, changed = rng.random(), list(ids)
    if kind < 0.5:
        changed[rng.randrange(len(changed))] = python_value(rng)
    elif kind < 0.7:
        changed = changed * rng.choice((0, 10, 1000))
    elif kind < 0.9:
        return np.array(changed).astype(rng.choice(("int8", "uint16", "int64", "uint64", "float32", "bool", "object")))
    else:
        return np.array([changed, changed])
    return tuple(changed) if rng.random() < 0.2 else changed
