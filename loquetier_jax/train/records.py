"""The records of a job's data, in every form it can come in: files, lists, generators, datasets, token ids."""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from loquetier_jax.errors import DataError, short
from loquetier_jax.json_records import read_records
from loquetier_jax.token_ids import are_token_ids, listed
from loquetier_jax.train.formats import Chat, parse_record, refuse_chat_columns, refuse_columns

ANSWERS = ("completion", "output", "answer", "text")  # what is learnt, in the order in which formats are recognised
MASKS = ("completion_mask", "assistant_masks")  # TRL's
NOT_LEARNT = -100  # in labels


def records_of(data: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(place, record) of everything in `data`; columns that are null are left out.

    Args:
        data: A file of JSON lines or of one JSON array, or any iterable of mappings: a list, a generator, a
            `datasets.Dataset`.
        name: What to call an iterable in messages.

    Raises:
        DataError: none of these, or a line that is no JSON.
    """
    if isinstance(data, str) and not data:
        raise DataError(f"{name or 'data'}: got '', expected a file of JSON lines, or an iterable of records")
    if isinstance(data, (str, os.PathLike)):
        records = read_records(os.fspath(data), DataError)
    else:
        records = ((f"{name}[{i}]", record) for i, record in enumerate(_iterable(data, name)))
    # Arrow gives every record every key that one of them has: what nobody wrote is taken out again.
    deep = hasattr(data, "column_names")
    for where, record in records:
        if isinstance(record, Mapping):
            record = {key: _without_nulls(v) if deep else v for key, v in record.items() if v is not None}
        yield where, record


def check_records(data: Any, name: str = "data") -> None:
    """Reads data for what is wrong with it already without a tokenizer: before a model is loaded for it.

    Raises:
        DataError: see `records_of`, `formats.parse_record` and `tokenized`.
    """
    for where, record in records_of(data, name):
        if isinstance(record, dict) and "input_ids" in record:
            tokenized(record, where, completion_only=True)
        elif not (isinstance(record, dict) and is_empty(record, where)):
            parse_record(record, where)


def is_empty(record: Mapping[str, Any], where: str) -> bool:
    """Whether a record is whole but for its answers, which are empty text: nothing to learn, as data sets have some.

    Raises:
        DataError: it would be refused whatever the answer was.
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
    """Token ids and which of them are learnt, of a record that has them already.

    Args:
        record: `input_ids`, and beside it any of `labels` (the same ids, -100 where nothing is learnt), TRL's
            `completion_mask` and `assistant_masks` (1 where something is), `attention_mask` (0 on padding, left out).
            Arrays and tensors are as good as lists.
        where: File and line, for messages.
        completion_only: False: the masks do not count, the labels do.

    Raises:
        DataError: not token ids, columns of other lengths, labels that are other ids, several samples in one.
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
    """A nested value without the keys of mappings that are null."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(v) for key, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value
