"""Reads a job's records from files, lists, generators or datasets, as text or token ids."""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from loquetier_jax.errors import DataError, short
from loquetier_jax.json_records import read_records
from loquetier_jax.token_ids import are_token_ids, listed
from loquetier_jax.train.formats import Chat, parse_record, refuse_chat_columns, refuse_columns

ANSWERS = ("completion", "output", "answer", "text")  # columns to train on, in the order of format recognition
MASKS = ("completion_mask", "assistant_masks")  # from TRL
NOT_LEARNT = -100  # label of tokens without loss


def records_of(data: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yields (location, record) for everything in `data`, without null columns.

    Args:
        data: A file of JSON lines or of one JSON array, or any iterable of mappings: a list, a generator, a
            `datasets.Dataset`.
        name: Name of an iterable in error messages.

    Raises:
        DataError: none of these, or invalid JSON.
    """
    if isinstance(data, str) and not data:
        raise DataError(f"{name or 'data'}: got '', expected a file of JSON lines, or an iterable of records")
    if isinstance(data, (str, os.PathLike)):
        records = read_records(os.fspath(data), DataError)
    else:
        records = ((f"{name}[{i}]", record) for i, record in enumerate(_iterable(data, name)))
    # Arrow gives every record all keys that occur in any record, with nulls; remove those again.
    deep = hasattr(data, "column_names")
    for where, record in records:
        if isinstance(record, Mapping):
            record = {key: _without_nulls(v) if deep else v for key, v in record.items() if v is not None}
        yield where, record


def check_records(data: Any, name: str = "data") -> None:
    """Checks everything about data that does not need a tokenizer, so that it can be refused before a model is loaded.

    Raises:
        DataError: see `records_of`, `formats.parse_record` and `tokenized`.
    """
    for where, record in records_of(data, name):
        if isinstance(record, dict) and "input_ids" in record:
            tokenized(record, where, completion_only=True)
        elif not (isinstance(record, dict) and is_empty(record, where)):
            parse_record(record, where)


def is_empty(record: Mapping[str, Any], where: str) -> bool:
    """Whether a record is valid except that its answers are empty, as happens in some datasets: nothing to train on.

    Raises:
        DataError: it would be refused with any answer.
    """
    if "input_ids" in record:
        return False
    chat = not record.keys().isdisjoint(("messages", "conversations")) or isinstance(record.get("completion"), list)
    if chat:
        parsed = parse_record(record, where)
        return isinstance(parsed, Chat) and parsed.num_empty > 0 and not any(parsed.train)
    answer = next((column for column in ANSWERS if column in record), None)
    if answer is None or not isinstance(record[answer], str) or record[answer]:
        return False
    parse_record({**record, answer: "."}, where)
    return True


def tokenized(record: Mapping[str, Any], where: str, *, completion_only: bool) -> tuple[list[int], list[bool]]:
    """(token ids, which of them have loss) of a record that is already tokenized.

    Args:
        record: `input_ids`, and optionally `labels` (the same ids, or -100 for no loss), TRL's `completion_mask` and
            `assistant_masks` (1 for loss), and `attention_mask` (0 on padding, which is removed). Lists, arrays or
            tensors.
        where: File and line, for error messages.
        completion_only: If False, the masks are ignored, but not the labels.

    Raises:
        DataError: not token ids, columns of different lengths, labels that differ from the ids, or several samples in
            one record.
    """
    refuse_columns(record, where)
    refuse_chat_columns(record, where, "input_ids")
    ids = _column(record, "input_ids", where)
    for key in ("position_ids", "seq_lengths", "cu_seqlens"):
        if key in record and listed(record[key]) not in (list(range(len(ids))), [len(ids)]):
            raise DataError(f"{where}: {key}: got several samples in one record, expected one each")
    learn = [True] * len(ids)
    if "labels" in record:
        labels = _column(record, "labels", where, len(ids))
        odd = next((i for i, (a, b) in enumerate(zip(labels, ids, strict=True)) if a not in (b, NOT_LEARNT)), None)
        if odd is not None:
            expected = f"{short(ids[odd])} as in input_ids, or {NOT_LEARNT}"
            raise DataError(f"{where}: labels[{odd}]: got {short(labels[odd])}, expected {expected}")
        learn = [label != NOT_LEARNT for label in labels]
    for key in MASKS if completion_only else ():
        if key in record:
            mask = _column(record, key, where, len(ids))
            learn = [a and bool(b) for a, b in zip(learn, mask, strict=True)]
    return _unpadded(ids, learn, record, where)


def _unpadded(
    ids: list[int], learn: list[bool], record: Mapping[str, Any], where: str
) -> tuple[list[int], list[bool]]:
    if "attention_mask" not in record:
        return ids, learn
    kept = [i for i, a in enumerate(_column(record, "attention_mask", where, len(ids))) if a]
    at = slice(kept[0], kept[-1] + 1) if kept else slice(0)
    if kept != list(range(len(ids)))[at]:
        raise DataError(f"{where}: attention_mask: got zeros between ones, expected padding at the ends alone")
    return ids[at], learn[at]


def _column(record: Mapping[str, Any], key: str, where: str, length: int | None = None) -> list[int]:
    value = listed(record[key])
    if isinstance(value, (list, tuple)):
        value = [int(i) if isinstance(i, bool) and key in MASKS else i for i in value]
    if not are_token_ids(value):
        raise DataError(f"{where}: {key}: got {short(value, 80)}, expected a list of integers")
    if length is not None and len(value) != length:
        raise DataError(f"{where}: {key}: got {len(value)} values, expected {length}, one for each of input_ids")
    return value


def _iterable(data: Any, name: str) -> Iterable[Any]:
    expected = "a file of JSON lines, or a list or other iterable of records"
    if isinstance(data, Mapping):
        got = f"{type(data).__name__} with keys {short(list(data), 200)}"
        raise DataError(f"{name}: got {got}, expected {expected}, as one split of a DatasetDict is")
    try:
        if isinstance(data, (bytes, bytearray)):
            raise TypeError
        return iter(data)
    except TypeError as error:
        raise DataError(f"{name}: got {type(data).__name__}, expected {expected}") from error


def _without_nulls(value: Any) -> Any:
    """A nested value without null-valued keys."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(v) for key, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value
