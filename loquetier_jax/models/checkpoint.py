"""Reads HF safetensors checkpoints, single-file or sharded, one tensor at a time."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# Registers bfloat16 with numpy, where safetensors looks it up.
import ml_dtypes  # noqa: F401
import numpy as np
from safetensors import SafetensorError, safe_open

from loquetier_jax.errors import ModelError
from loquetier_jax.models.hf_config import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = ("F32", "F16", "BF16")
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_ROWS = 4096  # rows compared at a time
_SHOWN = 5  # tensors listed in an error message


@dataclass(frozen=True)
class Entry:
    """Location, name, shape and dtype of a tensor, from its file's header."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * _BYTES.get(self.dtype, 8)


class Checkpoint:
    """The tensors of a model folder. Construction reads only headers; no file is kept open.

    Attributes:
        entries: Tensor name -> Entry.
    """

    entries: dict[str, Entry]

    def __init__(self, folder: Path) -> None:
        """Lists the tensors of all files.

        Raises:
            ModelError: no safetensors, a missing or unreadable file, or a tensor in two files; names it.
        """
        self.folder = folder
        self.entries = {}
        for file in _files(folder):
            for name, entry in _header(file).items():
                if name in self.entries:
                    raise ModelError(f"{name}: is in both {self.entries[name].file.name} and {file.name}")
                self.entries[name] = entry

    def check(self, expected: Mapping[str, tuple[int, ...]], harmless: tuple[str, ...]) -> None:
        """Checks names, shapes and dtypes against what a model needs.

        Args:
            expected: Tensor name -> shape.
            harmless: Suffixes of additional names to ignore.

        Raises:
            ModelError: a missing, unexpected or misshapen tensor, or one that is not f32, f16 or bf16.
        """
        missing = [name for name in expected if name not in self.entries]
        if missing:
            raise ModelError(f"{self.folder}: missing {_listed(missing)}")
        extra = [name for name in self.entries if name not in expected and not name.endswith(harmless)]
        if extra:
            raise ModelError(f"{self.folder}: unexpected {_listed(extra)}")
        for name, shape in expected.items():
            entry = self.entries[name]
            if entry.shape != shape:
                raise ModelError(f"{name}: has shape {entry.shape} in {entry.file.name}, expected {shape}")
            if entry.dtype not in DTYPES:
                raise ModelError(f"{name}: has dtype {entry.dtype} in {entry.file.name}, expected {DTYPES}")

    def rename(self, name: str, new: str) -> None:
        """Makes a tensor available under another name."""
        self.entries[new] = self.entries.pop(name)

    def same(self, name: str, other: str) -> bool:
        """Whether two tensors of the same shape have equal values; compares a few rows at a time.

        Raises:
            ModelError: a file can no longer be read.
        """
        entries = self.entries[name], self.entries[other]
        rows = entries[0].shape[0]
        try:
            with safe_open(entries[0].file, "numpy") as one, safe_open(entries[1].file, "numpy") as two:
                slices = one.get_slice(entries[0].name), two.get_slice(entries[1].name)
                for start in range(0, rows, _ROWS):
                    ours, theirs = (s[start : min(start + _ROWS, rows)].astype(np.float32) for s in slices)
                    if not np.array_equal(ours, theirs):
                        return False
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.folder}: cannot read {name} and {other} ({error})") from error
        return True

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor into a new host array, in the dtype of the file.

        Raises:
            ModelError: the file can no longer be read.
        """
        entry = self.entries[name]
        try:
            with safe_open(entry.file, framework="numpy") as tensors:
                return tensors.get_tensor(entry.name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{entry.file}: cannot read {entry.name} ({error})") from error


def _files(folder: Path) -> list[Path]:
    single, index = folder / SINGLE, folder / INDEX
    if single.exists():
        return [single]
    if not index.exists():
        raise ModelError(f"{folder}: has neither {SINGLE} nor {INDEX} (other formats are not supported)")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ModelError(f"{index}: weight_map: expected a mapping of tensor names to file names")
    for tensor, name in shards.items():
        if Path(name).name != name:  # refuse paths that leave the folder
            raise ModelError(f"{index}: {tensor}: got {name!r}, expected the name of a file in the folder")
        if not (folder / name).exists():
            raise ModelError(f"{folder / name}: no such file, though {INDEX} says it holds {tensor}")
    return [folder / name for name in sorted(set(shards.values()))]


def _header(file: Path) -> dict[str, Entry]:
    try:
        with safe_open(file, framework="numpy") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {n: Entry(file, n, tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: not a readable safetensors file ({error})") from error


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"tensor{'s' if len(names) > 1 else ''} {', '.join(names[:_SHOWN])}{rest}"
