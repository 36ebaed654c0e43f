"""PEFT folders as the store knows them: checked without reading a tensor, and without holding a lock."""

import os
import threading
from pathlib import Path
from typing import NamedTuple

from loquetier_jax.adapters.lora import LoraConfig, LoraShape
from loquetier_jax.adapters.peft import fingerprint, inspect_peft
from loquetier_jax.adapters.stored import StoredTensor
from loquetier_jax.models.spec import DecoderSpec

Fingerprint = tuple[tuple[int, int], ...]


class FoundAdapter(NamedTuple):
    """An adapter in a folder.

    Attributes:
        folder: Its PEFT folder, absolute.
        fingerprint: `peft.fingerprint(folder)`, taken before anything else was read.
        config, shape, tensors: See `peft.InspectedAdapter`.
    """

    folder: Path
    fingerprint: Fingerprint
    config: LoraConfig
    shape: LoraShape
    tensors: tuple[StoredTensor, ...]


class Folders:
    """Folders found before: a folder that many names share is checked once. Thread-safe.

    Args:
        spec: The base.
        most: Folders remembered, the oldest forgotten first.
    """

    def __init__(self, spec: DecoderSpec, most: int = 256) -> None:
        self._spec, self._most = spec, most
        self._found: dict[Path, FoundAdapter] = {}
        self._lock = threading.Lock()

    def read(self, folder: str | os.PathLike[str]) -> FoundAdapter:
        """`read_folder`, or what it returned before if the folder has not changed since.

        Raises:
            AdapterError: what `read_folder` refuses.
        """
        path = Path(folder).absolute()
        known = self._found.get(path)
        if known is not None and fingerprint(path) == known.fingerprint:
            return known
        found = read_folder(path, self._spec)
        with self._lock:
            self._found.pop(path, None)
            self._found[path] = found
            if len(self._found) > self._most:
                del self._found[next(iter(self._found))]
        return found


def read_folder(folder: str | os.PathLike[str], spec: DecoderSpec) -> FoundAdapter:
    """Checks a PEFT folder by its config, and by the header and the size of its weights; reads no tensor.

    Raises:
        AdapterError: what `peft.read_peft` refuses.
    """
    # Fingerprint first, so that a folder rewritten meanwhile counts as changed.
    before = fingerprint(folder)
    return FoundAdapter(Path(folder).absolute(), before, *inspect_peft(folder, spec))
