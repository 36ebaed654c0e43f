"""Moves adapter weights between device pages, host memory and PEFT folders, and evicts idle versions."""

import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from loquetier_jax.adapters.host_copies import HostCopies
from loquetier_jax.adapters.loader import Loader
from loquetier_jax.adapters.lora import LoraShape, LoraWeights, check_weights
from loquetier_jax.adapters.peft import fingerprint, read_weights
from loquetier_jax.adapters.version import Version
from loquetier_jax.errors import AdapterError, CapacityError, IntegrityError
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.pool import IdPool

JOBS = "jobs"
"""Owner of the pages of all training jobs; a version's pages are owned by its id."""

STAGED_PAGES = 4  # pages staged on the device at a time; the largest adapter if it has more


def host_copy(weights: LoraWeights) -> LoraWeights:
    """A deep copy of the weights as numpy f32 arrays."""
    return {key: {n: np.array(a, np.float32) for n, a in arrays.items()} for key, arrays in weights.items()}


@dataclass(frozen=True)
class PageTransfers:
    """How weights become pages on the device; all but `write` are slow and run in any thread, without a lock.

    Attributes:
        cast: (f32 weights, shape) -> pages on the host.
        read: Version -> the same, from its folder; None: its weights in f32, cast.
        stage: Pages on the host -> pages that `write` takes, on the device.
        write: Writes staged pages to page ids, without waiting for the device.
    """

    cast: Callable[[LoraWeights, LoraShape], Any]
    write: Callable[[tuple[int, ...], Any], None]
    read: Callable[[Version], Any] | None = None
    stage: Callable[[Any], Any] = lambda pages: pages


class Residency:
    """Moves versions between device, host and disk; does not deal with names.

    Args:
        spec: The base.
        pool: The page ids.
        versions: The live versions by id; the registry's own dict, read-only here.
        transfers: How weights become pages.
        max_host_adapters: See `AdapterStore`.
        max_pages: Maximum pages of one adapter.
        pinned: Whether a version must stay on the device.
        lock: The store's lock.

    Attributes:
        copies: The host copies.
        loader: Loads versions that requests wait for.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        pool: IdPool,
        versions: Mapping[int, Version],
        transfers: PageTransfers,
        max_host_adapters: int | None,
        max_pages: int,
        pinned: Callable[[Version], bool],
        lock: threading.RLock,
    ) -> None:
        self._spec = spec
        self._pool = pool
        self._versions = versions
        self._transfers = transfers
        self._pinned = pinned
        self.copies = HostCopies(self._made, max_host_adapters, self._can_make, versions, lock)
        room, copies = max(STAGED_PAGES, max_pages), self.copies
        self.loader = Loader(self._load, copies.get, copies.has_room, room, lock)

    def resident(self) -> list[Version]:
        """The versions on the device, in no order."""
        return [self._versions[owner] for owner in self._pool.owners() if owner in self._versions]

    def is_ready(self, version: Version) -> bool:
        """Whether `ensure` has nothing to wait for: the version is on the device or staged, or cannot be loaded."""
        if version.pages is not None or version.snapshot is not None or self.loader.is_done(version):
            return True
        return version.id not in self._versions  # whoever needs it is told that it has been unloaded

    def ensure(self, version: Version) -> tuple[int, ...]:
        """The version's pages; if it has none, writes what is staged, or else loads it in this thread.

        Raises:
            AdapterError: its weights cannot be read.
            CapacityError: not enough pages can be freed now; nothing is changed.
        """
        if version.pages is not None:
            return version.pages
        # Check for room before taking what is staged: without room it stays staged.
        victims = self._victims(version.shape.num_pages, None)
        staged = self.loader.take(version)
        if staged is None:
            staged = self._transfers.stage(self.copies.get_alone(version))
        pages = self._take(version.shape.num_pages, version.id, victims)
        try:
            self._transfers.write(pages, staged)
        except BaseException:
            self._pool.give_back(pages, 0, version.id)
            raise
        version.pages = pages
        return pages

    def take(self, count: int, owner: Hashable, doomed: Version | None = None) -> tuple[int, ...]:
        """Takes `count` pages for `owner`, evicting idle versions, least recently used first.

        Args:
            count: Number of pages.
            owner: Their new owner.
            doomed: A version about to be forgotten: if idle, it is evicted first and its weights are not saved.

        Raises:
            CapacityError: not enough pages can be freed now; nothing is changed.
        """
        return self._take(count, owner, self._victims(count, doomed))

    def load_host(self, version: Version) -> LoraWeights:
        """The f32 weights of a version without a folder, moved to the host if necessary.

        Raises:
            AdapterError: they cannot be read.
        """
        if version.host is None:
            weights = version.snapshot()
            check_weights(weights, version.shape, self._spec)
            version.host, version.snapshot = host_copy(weights), None
        return version.host

    def read_source(self, version: Version) -> LoraWeights:
        """The version's f32 weights, read from its folder; does not modify the version.

        Raises:
            AdapterError: they cannot be read, or the folder has changed.
        """
        self._check_source(version)
        return read_weights(version.source, version.shape, self._spec)

    def staged(self, weights: LoraWeights, shape: LoraShape) -> Any:
        """Pages on the device of weights that no version has, for `write`; slow."""
        return self._transfers.stage(self._transfers.cast(weights, shape))

    def free(self, version: Version) -> None:
        """Gives back the version's pages, if any; they are reused once the last step that read them has completed."""
        if version.pages is not None:
            self._pool.give_back(version.pages, version.last_epoch, version.id)
            version.pages = None

    def forget(self, version: Version) -> None:
        """Drops all that is kept of a version that is no longer live."""
        self.free(version)
        self.loader.forget(version)
        self.copies.forget(version)

    def close(self) -> None:
        """Ends loads and drops what is staged and copied; returns once no thread is at work."""
        self.loader.close()
        self.copies.clear()

    def check_integrity(self) -> None:
        """Raises IntegrityError unless pages and versions agree and every version has weights somewhere."""
        self._pool.check_integrity()
        for version in self._versions.values():
            owned = self._pool.owned_by(version.id)
            if owned != set(version.pages or ()) or (version.pages and len(owned) != version.shape.num_pages):
                raise IntegrityError(f"version {version.id} has pages {version.pages}, in the pool {owned}")
            if version.residency == "disk" and version.source is None:
                raise IntegrityError(f"version {version.id} of {version.name!r} has no weights on device, host or disk")
        strange = self._pool.owners() - self._versions.keys() - {JOBS}
        if strange:
            raise IntegrityError(f"adapter pages are owned by versions {strange}, which have been unloaded")
        self.copies.check_integrity()
        self.loader.check_integrity()

    def _load(self, version: Version) -> Any:
        """Makes the version's pages and transfers them to the device; the caller does not hold the lock."""
        return self._transfers.stage(self.copies.get(version))

    def _made(self, version: Version) -> Any:
        """The version's pages on the host."""
        if version.snapshot is not None:
            return self._transfers.cast(version.snapshot(), version.shape)
        if version.host is not None:
            return self._transfers.cast(version.host, version.shape)
        self._check_source(version)
        if self._transfers.read is not None:
            made = self._transfers.read(version)
        else:
            made = self._transfers.cast(read_weights(version.source, version.shape, self._spec), version.shape)
        self._check_source(version)  # it may have been replaced while it was read
        return made

    def _take(self, count: int, owner: Hashable, victims: list[Version]) -> tuple[int, ...]:
        for victim in victims:
            self.free(victim)
        return self._pool.take(count, owner)

    def _victims(self, count: int, doomed: Version | None) -> list[Version]:
        """Versions whose eviction frees `count` pages immediately; their weights are saved to the host if needed.

        Those that requests wait for go last.
        """
        short = count - self._pool.num_free
        idle = [v for v in self.resident() if self._is_idle(v)]
        victims: list[Version] = []
        for version in sorted(idle, key=lambda v: (v is not doomed, v.holds > 0, v.last_used)):
            if short <= 0:
                break
            if version is doomed or (not self._pinned(version) and self.is_elsewhere(version)):
                victims.append(version)
                short -= version.shape.num_pages
        if short > 0:
            raise CapacityError(
                f"adapter pages: {count} requested; {self._pool.num_free} are free, the others in flight, "
                "pinned, owned by jobs, or waiting for a step to complete"
            )
        for version in victims:
            if version.snapshot is not None and version is not doomed:
                self.load_host(version)
        return victims

    def _is_idle(self, version: Version) -> bool:
        # Pages used by an incomplete step would not be free immediately.
        done = version.last_epoch <= self._pool.completed
        return version.in_flight == 0 and done

    def is_elsewhere(self, version: Version) -> bool:
        """Whether its weights can be recovered after its pages are evicted."""
        return version.copy is not None or version.snapshot is not None or self._can_make(version)

    def _can_make(self, version: Version) -> bool:
        """Whether its host copy can be made again."""
        return version.host is not None or self._source_unchanged(version)

    def _check_source(self, version: Version) -> None:
        if not self._source_unchanged(version):
            raise AdapterError(f"{version.name}: {version.source} has changed since it was loaded")

    def _source_unchanged(self, version: Version) -> bool:
        if version.source is None:
            return False
        try:
            return fingerprint(version.source) == version.fingerprint
        except AdapterError:
            return False
