"""Reads records, each with its location, from a file of JSON lines or of one JSON array. Imports no jax."""

import codecs
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from loquetier_jax.errors import LoquetierError

_BLANK = re.compile(r"[ \t\r\n]*")
_FORM = "expected one JSON object a line, or one JSON array of them"


def check_file(path: str | Path, error: type[LoquetierError]) -> Path:
    """The path of an existing file; otherwise raises `error`, naming it."""
    path = Path(path)
    try:
        known, folder = path.is_file(), path.is_dir()
    except OSError as failure:  # e.g. a name that is too long
        raise error(f"{path}: {failure.strerror}") from failure
    if not known:
        raise error(f"{path}: {'a folder, expected a file' if folder else 'no such file'}")
    return path


def read_records(path: str | Path, error: type[LoquetierError]) -> Iterator[tuple[str, Any]]:
    """Yields (location, value): "path:line", or "path:line: record i" in an array. Blank lines are skipped.

    The text is UTF-8, or UTF-16 or UTF-32 if it starts with that byte order mark.

    Args:
        path: The file.
        error: Type of the exceptions raised.

    Raises:
        LoquetierError: of type `error`: the file is missing, or a line cannot be parsed (with its location).
    """
    path = check_file(path, error)
    with _opened(path, error) as file:
        lines = enumerate(file, start=1)
        number, first = next(((n, line) for n, line in lines if line.strip()), (1, b""))
        if first.lstrip().startswith(b"["):
            yield from _array(b"\n" * (number - 1) + first + file.read(), path, error)
            return
        if first:
            yield f"{path}:{number}", _value(first, f"{path}:{number}", error)
        for number, line in lines:
            if line.strip():
                yield f"{path}:{number}", _value(line, f"{path}:{number}", error)


def parse_json(text: str, where: str, error: type[LoquetierError], form: str = _FORM) -> Any:
    """Parses one JSON value; otherwise raises `error` with a message that starts with `where` and ends with `form`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as failure:  # ValueError includes integers beyond Python's digit limit
        raise error(f"{where}: not JSON: {failure}; {form}") from failure


def _value(line: bytes, where: str, error: type[LoquetierError]) -> Any:
    return parse_json(_decoded(line, where, error), where, error)


def _array(raw: bytes, path: Path, error: type[LoquetierError]) -> Iterator[tuple[str, Any]]:
    """Decodes the elements of a top-level array one at a time, to know each one's line."""
    text = _decoded(raw, str(path), error)
    decoder, at, line, index = json.JSONDecoder(), text.index("[") + 1, 1, 0
    at = _BLANK.match(text, at).end()
    line += text.count("\n", 0, at)
    more = not text.startswith("]", at)
    while more:
        where = f"{path}:{line}: record {index}"
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as failure:
            raise error(f"{where}: not JSON: {failure}; {_FORM}") from failure
        yield where, value
        end = _BLANK.match(text, end).end()
        more = text.startswith(",", end)
        after = _BLANK.match(text, end + 1).end() if more else end
        line, at, index = line + text.count("\n", at, after), after, index + 1
    if not text.startswith("]", at) or text[at + 1 :].strip():
        raise error(f"{path}:{line}: not JSON: got {text[at : at + 20]!r} after {index} records; {_FORM}")


def _decoded(raw: bytes, where: str, error: type[LoquetierError]) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as failure:
        raise error(f"{where}: not UTF-8: {failure}") from failure


def _opened(path: Path, error: type[LoquetierError]) -> BinaryIO:
    """The file's contents as a UTF-8 stream, past any byte order mark."""
    try:
        file = path.open("rb")
    except OSError as failure:
        raise error(f"{path}: {failure.strerror}") from failure
    head = file.read(4)
    # The UTF-32-LE mark starts with the UTF-16-LE one.
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        with file:
            raw = head + file.read()
        encoding = json.detect_encoding(raw)
        try:
            return io.BytesIO(raw.decode(encoding).encode())
        except UnicodeError as failure:
            raise error(f"{path}: not {encoding.upper()}: {failure}") from failure
    file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
    return file
