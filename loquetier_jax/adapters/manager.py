"""Adapters at run time: load, unload, rename, pin, save."""

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
    """Brings adapters in and out, in any thread; folders are read and written without the loop's lock.

    Args:
        spec: The base.
        store: The adapters.
        driver: Of the loop.
        base: The folder of the base, and what exported adapters name as it; "" where there is none.
    """

    def __init__(self, spec: DecoderSpec, store: AdapterStore, driver: Driver, base: str) -> None:
        self._spec, self._store, self._driver, self._base = spec, store, driver, base

    def load_adapter(self, name: str, path: str | Path, *, replace: bool = False) -> Version:
        """Adds an adapter from a PEFT folder; it serves the next request, nothing recompiles.

        Raises:
            AdapterError: see `adapters.peft.read_peft`; also not a path, or a name in use, unless `replace`
                makes a new version.
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
            AdapterError: not weights, or ones that do not fit the shape or the base, or a name in use.
        """
        for argument, value, kind in (("weights", weights, Mapping), ("shape", shape, LoraShape)):
            if not isinstance(value, kind):
                raise AdapterError(f"{argument}: got {short(value, 200)}, expected a {kind.__name__}")
        with self._driver.entered():
            return self._store.add(name, weights, shape, replace=replace)

    def unload_adapter(self, name: str) -> None:
        """Takes a name out of service; requests that have it run to their end."""
        with self._driver.entered():
            self._store.unload(name)

    def rename_adapter(self, name: str, new: str) -> None:
        """Gives an adapter another name."""
        with self._driver.entered():
            self._store.rename(name, new)

    def pin_adapter(self, name: str, pinned: bool = True) -> None:
        """Keeps an adapter on the device, or lets it be evicted again.

        Raises:
            AdapterError: unknown name.
            CapacityError: no room now.
        """
        with self._driver.entered():
            self._store.pin(name) if pinned else self._store.unpin(name)

    def save_adapter(self, name: str, path: str | Path) -> Path:
        """Writes the current version of an adapter as a PEFT folder; raises AdapterError for an unknown one."""
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

        The current version is merged, on the host, into the tensors of the folder that the base was loaded from, in
        their own dtype: that folder has to be as it was then. See `adapters.merge.write_merged`.

        Raises:
            AdapterError: an unknown name, or a folder that holds something.
            ModelError: the base was not loaded from a folder, or that cannot be read any more.
        """
        path = path_of(path, "path", "the folder to write", AdapterError)
        if not self._base:
            raise ModelError("export_merged: this engine was not loaded from a folder, expected from_pretrained(path)")
        with self._driver.entered():
            version = self._store.get(name)
            weights = self._store.weights(version)
        write_merged(path, self._base, weights, version.shape)
        return path
