"""Reads a PEFT folder without touching a store, so that no lock is held during disk access."""

import os
from pathlib import Path
from typing import NamedTuple

from loquetier_jax.adapters.peft import PeftAdapter, fingerprint, read_peft
from loquetier_jax.models.spec import DecoderSpec


class FoundAdapter(NamedTuple):
    """An adapter read from a folder.

    Attributes:
        folder: Its PEFT folder.
        fingerprint: `peft.fingerprint(folder)`, taken before reading.
        adapter: Its config, shape and weights.
    """

    folder: Path
    fingerprint: tuple[tuple[int, int], ...]
    adapter: PeftAdapter


def read_folder(folder: str | os.PathLike[str], spec: DecoderSpec) -> FoundAdapter:
    """Reads a PEFT folder.

    Raises:
        AdapterError: what `peft.read_peft` refuses.
    """
    # Fingerprint first, so that a folder rewritten during the read counts as changed.
    before = fingerprint(folder)
    return FoundAdapter(Path(folder), before, read_peft(folder, spec))
