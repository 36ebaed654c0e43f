"""Adapters in page form in host memory: what a load needs, bounded, and shared by names of one folder."""

import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loquetier_jax.adapters.flat import all_finite
from loquetier_jax.adapters.version import Version
from loquetier_jax.errors import IntegrityError


@dataclass(eq=False)
class HostCopy:
    """The pages of one or several versions that have the same weights; read-only. `finite`: see `Version`."""

    pages: Any
    finite: bool | None = None
    users: set[Version] = field(default_factory=set)


class HostCopies:
    """Page-form copies by what they are copies of; beyond `most`, the least recently used are dropped.

    Args:
        make: Reads or casts the pages of a version; slow, called without the lock.
        most: Maximum number of copies, except for those that could not be made again; None keeps all.
        recoverable: Whether the copy of a version can be made again.
        versions: The live versions by id.
        lock: The store's lock.
    """

    def __init__(
        self,
        make: Callable[[Version], Any],
        most: int | None,
        recoverable: Callable[[Version], bool],
        versions: Mapping[int, Version],
        lock: threading.RLock,
    ) -> None:
        self._make, self._most, self._recoverable = make, most, recoverable
        self._versions, self._lock = versions, lock
        self._copies: dict[Hashable, HostCopy] = {}  # least recently used first
        self._making: dict[Hashable, threading.Lock] = {}

    def get(self, version: Version) -> Any:
        """The version's pages, made if necessary; of threads that need the same ones, one makes them.

        The caller must not hold the lock.

        Raises:
            AdapterError: its weights cannot be read.
        """
        key = _key(version)
        with self._lock:
            own = self._making.setdefault(key, threading.Lock())
        try:
            with own:
                return self.get_alone(version)
        finally:
            with self._lock:
                self._making.pop(key, None)

    def get_alone(self, version: Version) -> Any:
        """Like `get`, without waiting for a thread that makes the same pages; the caller may hold the lock."""
        with self._lock:
            found = self._copies.pop(_key(version), None)
            if found is not None:
                self._use(version, found)
                return found.pages
        pages = self._make(version)
        made = HostCopy(pages, all_finite(pages) if isinstance(pages, np.ndarray) else None)
        with self._lock:
            if self._versions.get(version.id) is version:
                self._use(version, self._copies.pop(_key(version), None) or made)
            self._trim()
        return pages

    def has_room(self) -> bool:
        """Whether another copy can be kept without dropping one."""
        return self._most is None or len(self._copies) < self._most

    def forget(self, version: Version) -> None:
        """Drops the copy of a version that is no longer live, unless others share it."""
        if version.copy is not None:
            version.copy.users.discard(version)
            if not version.copy.users:
                self._copies.pop(_key(version), None)
            version.copy = None

    def clear(self) -> None:
        """Drops all copies."""
        for key in list(self._copies):
            self._drop(key)

    def check_integrity(self) -> None:
        """Raises IntegrityError unless copies and versions agree, and no copy is kept that could be dropped."""
        for key, copy in self._copies.items():
            if not copy.users or any(v.copy is not copy or self._versions.get(v.id) is not v for v in copy.users):
                raise IntegrityError(f"the host copy of {key} belongs to versions {[v.id for v in copy.users]}")
        strange = [v.id for v in self._versions.values() if v.copy is not None and v not in v.copy.users]
        strange += [v.id for v in self._versions.values() if v.copy not in (None, self._copies.get(_key(v)))]
        if strange:
            raise IntegrityError(f"versions {strange} have host copies that are not theirs")
        excess = 0 if self._most is None else len(self._copies) - self._most
        kept = [key for key, copy in self._copies.items() if self._can_drop(copy)]
        if excess > 0 and kept:
            raise IntegrityError(f"{len(self._copies)} host copies are kept, expected at most {self._most}")

    def _use(self, version: Version, copy: HostCopy) -> None:
        """Makes a copy the most recently used one, and the version's."""
        self._copies[_key(version)] = copy
        copy.users.add(version)
        version.copy, version.finite = copy, copy.finite

    def _can_drop(self, copy: HostCopy) -> bool:
        return all(self._recoverable(v) for v in list(copy.users)[:1])

    def _trim(self) -> None:
        excess = 0 if self._most is None else len(self._copies) - self._most
        for key, copy in list(self._copies.items()):
            if excess <= 0:
                break
            if self._can_drop(copy):
                self._drop(key)
                excess -= 1

    def _drop(self, key: Hashable) -> None:
        for version in self._copies.pop(key).users:
            version.copy = None


def _key(version: Version) -> Hashable:
    """What the copy is a copy of: a folder as it was, or the weights of one version."""
    return version.id if version.source is None else (version.source, version.fingerprint)
