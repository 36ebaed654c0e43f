"""Folders of checkpoints of jobs: damaged as a disk does it, and as somebody does it who renews the checksums."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import jax
import numpy as np

from loquetier_jax.errors import CheckpointError
from loquetier_jax.train.checkpoint import MARKER, CheckpointStore, find_checkpoint, read_arrays, read_state
from tests.fuzz.kind import listing
from tests.fuzz.mutate import json_text, mutate_file, mutate_tree, put

ARRAYS = {"master": {"lora_A": np.arange(200, dtype=np.float32)}, "opt_state": [np.ones((3, 4), np.float32)]}
STATE = {"name": "job", "step": 3, "record": [1, 2, {"loss": 0.1}]}


class Checkpoints:
    """The newer one of two checkpoints is damaged: it is refused by name, or what is read is what was saved."""

    errors = (CheckpointError,)

    def __init__(self, folder: Path) -> None:
        self._root = folder
        store = CheckpointStore(folder)
        self._older, self._path = store.save(ARRAYS, STATE | {"step": 2}), store.save(ARRAYS, STATE)
        self._good = {file: file.read_bytes() for file in self._path.rglob("*") if file.is_file()}

    def attempt(self, rng: random.Random) -> None:
        file = rng.choice([*self._good, self._path / MARKER, self._path / "state.json"])
        forged = rng.random() < 0.3
        try:
            if forged and file.name == "state.json":
                put(file, json_text(rng, mutate_tree(rng, {"format": 2, "state": STATE})))
            else:
                mutate_file(rng, file)
            if forged:
                self._renew_checksums()
            self._read(forged)
        finally:
            put(file, self._good[file])
            put(self._path / MARKER, self._good[self._path / MARKER])

    def _renew_checksums(self) -> None:
        kept = [file for file in self._good if file.name != MARKER and file.is_file()]
        digests = {str(file.relative_to(self._path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in kept}
        put(self._path / MARKER, json.dumps(digests).encode())

    def _read(self, forged: bool) -> None:
        before = listing(self._root)
        try:
            path = find_checkpoint(self._root)
            state = read_state(path)
            arrays = read_arrays(path, ARRAYS)
        finally:
            assert listing(self._root) == before
        right: Any = STATE if path == self._path else STATE | {"step": 2}
        assert forged or state == right
        for got, saved in zip(jax.tree.leaves(arrays), jax.tree.leaves(ARRAYS), strict=True):
            assert (got.shape, got.dtype) == (saved.shape, saved.dtype)
            assert forged or np.array_equal(got, saved)

    def traces(self) -> list[str]:
        return listing(self._root)
