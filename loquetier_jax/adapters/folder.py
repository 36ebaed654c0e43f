"""An adapter as a PEFT folder holds it, read without a store: nobody has to wait for the disk."""

import os
from pathlib import Path
from typing import NamedTuple

from loquetier_jax.adapters.peft import PeftAdapter, fingerprint, read_peft
from loquetier_jax.models.spec import DecoderSpec


class FoundAdapter(NamedTuple):
    """An adapter as a folder holds it.

    Attributes:
        folder: Where it lies.
        stamp: `peft.fingerprint(folder)` from before it was read.
        adapter: What it is.
    """

    folder: Path
    stamp: tuple[tuple[int, int], ...]
    adapter: PeftAdapter


def read_folder(folder: str | os.PathLike[str], spec: DecoderSpec) -> FoundAdapter:
    """Reads a PEFT folder.

    Raises:
        AdapterError: what `peft.read_peft` refuses.
    """
    # The stamp is taken first: a folder written anew during the read then counts as changed.
    stamp = fingerprint(folder)
    return FoundAdapter(Path(folder), stamp, read_peft(folder, spec))
