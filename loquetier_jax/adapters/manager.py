"""The engine's adapter methods: load, add, unload, rename, pin, save, export."""

from collections.abc import Mapping
from pathlib import Path

from loquetier_jax.adapters.folder import read_folder
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

    def load_adapter(self, name: str, path: str | Path, *, replace: bool = False) -> Version:
        """Adds an adapter from a PEFT folder; it serves from the next request on, and nothing recompiles.

        Raises:
            AdapterError: see `adapters.peft.read_peft`; also an invalid path, or a name in use without `replace`,
                which makes a new version.
        """
        path = path_of(path, "path", "a PEFT folder", AdapterError)
        check_name(name)
        self._driver.check_open()
        found = read_folder(path, self._spec)
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
        with self._driver.entered():
            return self._store.add(name, weights, shape, replace=replace)

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
        with self._driver.entered():
            self._store.pin(name) if pinned else self._store.unpin(name)

    def save_adapter(self, name: str, path: str | Path) -> Path:
        """Writes the current version of an adapter as a PEFT folder; raises AdapterError for an unknown name."""
        path = path_of(path, "path", "the folder to write", AdapterError)
        with self._driver.entered():
            version = self._store.get(name)
            weights = self._store.weights(version)
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
        with self._driver.entered():
            version = self._store.get(name)
            weights = self._store.weights(version)
        write_merged(path, self._base, weights, version.shape)
        return path
