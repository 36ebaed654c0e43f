"""The engine's adapter methods: load, add, unload, rename, pin, save, export."""

import threading
from collections.abc import Mapping
from pathlib import Path

from loquetier_jax.adapters.folder import Folders
from loquetier_jax.adapters.lora import LoraShape, LoraWeights
from loquetier_jax.adapters.merge import write_merged
from loquetier_jax.adapters.peft import write_peft
from loquetier_jax.adapters.registry import check_name
from loquetier_jax.adapters.store import AdapterStore
from loquetier_jax.adapters.version import Version
from loquetier_jax.arguments import path_of
from loquetier_jax.driver import Driver
from loquetier_jax.errors import AdapterError, ModelError, short
from loquetier_jax.models.spec import DecoderSpec


def current_weights(name: str, store: AdapterStore, driver: Driver) -> tuple[Version, LoraWeights]:
    """The current version of a name and its f32 weights; a folder is read without the loop's lock.

    Raises:
        AdapterError: an unknown name, or weights that cannot be read.
        EngineError: the engine was closed.
    """
    with driver.entered():
        version = store.hold(name)
    try:
        if version.source is None:  # possibly a job's masters, which the next step changes
            with driver.entered():
                return version, store.weights(version)
        return version, store.weights(version)
    finally:
        store.drop(version)


class AdapterManager:
    """Loads, saves and manages adapters. Thread-safe; folders are read and written without the loop's lock.

    Args:
        spec: The base.
        store: The adapters.
        driver: The loop's driver.
        base: The base model's folder, also written into exported adapters; "" if there is none.
    """

    def __init__(self, spec: DecoderSpec, store: AdapterStore, driver: Driver, base: str) -> None:
        self._spec, self._store, self._driver, self._base = spec, store, driver, base
        self._folders = Folders(spec)
        self._pinning = threading.Lock()

    def load_adapter(self, name: str, path: str | Path, *, replace: bool = False) -> Version:
        """Adds an adapter from a PEFT folder; it serves from the next request on, and nothing recompiles.

        The config, the header and the size of the weights are checked now; the weights are read in the background, or
        for the first request. The folder must not change before: if it has, requests that need it end with an error.

        Raises:
            AdapterError: see `adapters.peft.read_peft`; also an invalid path, or a name in use without `replace`,
                which makes a new version.
        """
        path = path_of(path, "path", "a PEFT folder", AdapterError)
        check_name(name)
        self._driver.check_open()
        found = self._folders.read(path)
        with self._driver.entered():
            return self._store.take_in(name, found, replace=replace)

    def add_adapter(
        self, name: str, weights: LoraWeights, shape: LoraShape, *, replace: bool = False
    ) -> Version:
        """Adds an adapter from weights in memory (copied to the host).

        Raises:
            AdapterError: invalid weights, weights that do not fit the shape or the base, or a name in use.
        """
        for argument, value, kind in (("weights", weights, Mapping), ("shape", shape, LoraShape)):
            if not isinstance(value, kind):
                raise AdapterError(f"{argument}: got {short(value, 200)}, expected a {kind.__name__}")
        self._driver.check_open()
        return self._store.add(name, weights, shape, replace=replace)  # copies them: not under the loop's lock

    def unload_adapter(self, name: str) -> None:
        """Removes a name; requests already using the adapter run to completion."""
        with self._driver.entered():
            self._store.unload(name)

    def rename_adapter(self, name: str, new: str) -> None:
        """Renames an adapter."""
        with self._driver.entered():
            self._store.rename(name, new)

    def pin_adapter(self, name: str, pinned: bool = True) -> None:
        """Keeps an adapter on the device, or lets it be evicted again.

        Raises:
            AdapterError: unknown name.
            CapacityError: not enough free adapter pages at the moment.
        """
        if not pinned:
            with self._driver.entered():
                self._store.unpin(name)
            return
        with self._driver.entered():
            version = self._store.hold(name)
        try:
            with self._pinning:  # one at a time: what is staged takes memory of the device
                self._store.load(version)  # slow, so without the engine's lock
                with self._driver.entered():
                    self._store.pin(name)
        finally:
            self._store.drop(version)

    def save_adapter(self, name: str, path: str | Path) -> Path:
        """Writes the current version of an adapter as a PEFT folder; raises AdapterError for an unknown name."""
        path = path_of(path, "path", "the folder to write", AdapterError)
        version, weights = current_weights(name, self._store, self._driver)
        self._store.keep_copies(path)
        write_peft(
            path,
            weights,
            version.shape,
            self._spec,
            config=version.config,
            base_model_name_or_path=self._base or None,
        )
        return path

    def export_merged(self, name: str, path: str | Path) -> Path:
        """Writes base and adapter as one HF model folder, which transformers loads without PEFT.

        The current version is merged, on the host, into the tensors of the folder the base was loaded from, in their
        own dtype; that folder must not have changed. See `adapters.merge.write_merged`.

        Raises:
            AdapterError: an unknown name, or a folder that is not empty.
            ModelError: the base was not loaded from a folder, or the folder can no longer be read.
        """
        path = path_of(path, "path", "the folder to write", AdapterError)
        if not self._base:
            raise ModelError("export_merged: this engine was not loaded from a folder, expected from_pretrained(path)")
        version, weights = current_weights(name, self._store, self._driver)
        write_merged(path, self._base, weights, version.shape)
        return path
