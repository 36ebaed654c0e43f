"""Tensors in a safetensors file: where they are, and their way from there into page form."""

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import DTypeLike

from loquetier_jax.adapters.flat import FlatPages, Layout, Piece
from loquetier_jax.adapters.lora import LoraModule, LoraShape
from loquetier_jax.errors import AdapterError

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
"""Dtypes that an adapter's tensors may have, by their names in the file; a numpy without ml_dtypes lacks the last."""

_LENGTH = 8  # bytes of the header's length, before the header


class StoredTensor(NamedTuple):
    """A tensor of an adapter in its file.

    Attributes:
        key, name: Its place in `LoraWeights`.
        dtype: A key of DTYPES.
        start: Its first byte in the file.
    """

    key: str
    name: str
    dtype: str
    start: int


class Entry(NamedTuple):
    """A tensor in a file's header: its dtype by name, its shape, its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file, by name, from a header that safetensors has checked.

    Raises:
        OSError, AdapterError: the file cannot be read, or has been cut meanwhile.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise AdapterError(f"the header is not JSON: {error}") from error
    begin = _LENGTH + length
    return {
        name: Entry(entry["dtype"], tuple(entry["shape"]), begin + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def cast_file(
    path: Path, tensors: Sequence[StoredTensor], shape: LoraShape, layout: Layout, dtype: DTypeLike
) -> FlatPages:
    """Reads an adapter into page form: `pages.pages_of` of its weights in f32, bit for bit.

    Args:
        path: Its weights file.
        tensors: All its tensors.
        shape: Its shape.
        layout: The columns of a page.
        dtype: Compute dtype.

    Raises:
        AdapterError: the file cannot be read, or is shorter than it was.
    """
    sizes = shape.array_shapes(layout.spec)
    sized = [(t, sizes[t.key][t.name], np.dtype(DTYPES[t.dtype])) for t in tensors]
    begin = min(t.start for t in tensors)
    end = max(t.start + dtype.itemsize * size[0] * size[1] for t, size, dtype in sized)
    # Read, not mapped: a mapped file that is cut while it is being read ends the process.
    data = np.empty(end - begin, np.uint8)
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(begin)
            read = _read_into(file, memoryview(data))
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error}") from error
    if read != len(data):
        raise AdapterError(f"{path}: got {begin + read} bytes, expected {end}: it has changed since it was loaded")
    return layout.cast(_pieces(data, begin, tensors, shape, layout), shape.num_pages, dtype)


def _read_into(file: object, view: memoryview) -> int:
    done = 0
    while done < len(view) and (count := file.readinto(view[done:])):
        done += count
    return done


def _pieces(
    data: np.ndarray, begin: int, tensors: Sequence[StoredTensor], shape: LoraShape, layout: Layout
) -> Iterator[Piece]:
    """The pieces of an adapter, as views of `data`; as few as possible: layers at equal distances are one piece.

    Args:
        data: The bytes of the file from `begin` on.
        begin: The first of them.
        tensors, shape, layout: See `cast_file`.
    """
    found = sorted((shape.by_key[t.key].target, t.name, shape.by_key[t.key].layer, t) for t in tensors)
    for _, run in groupby(found, key=lambda entry: entry[:2]):
        ordered = [(shape.by_key[t.key], t) for *_, t in run]
        while ordered:
            count, step = _even(ordered)
            module, first = ordered[0]
            features, out = layout.spec.target_shapes[module.target]
            size = (module.r, features) if first.name == "lora_A" else (out, module.r)
            dtype = np.dtype(DTYPES[first.dtype])
            one = np.ndarray(size, dtype, data, first.start - begin)
            arrays = as_strided(one, (count, *size), (step, *one.strides), writeable=False)
            yield Piece(module.layer, module.target, first.name, arrays, module.scaling)
            del ordered[:count]


def _even(ordered: Sequence[tuple[LoraModule, StoredTensor]]) -> tuple[int, int]:
    """How many of the first tensors are alike, of consecutive layers and evenly spaced, and their distance in bytes."""
    (module, first), count, step = ordered[0], 1, 0
    for other, tensor in ordered[1:]:
        alike = (other.layer, *other[2:], tensor.dtype) == (module.layer + count, *module[2:], first.dtype)
        step = tensor.start - first.start if count == 1 else step
        if not alike or step <= 0 or tensor.start != first.start + count * step:
            break
        count += 1
    return count, step if count > 1 else 0
