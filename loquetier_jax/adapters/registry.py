"""Adapter names, the version each points to, and the users of every version."""

import functools
import itertools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from loquetier_jax.adapters.lora import LoraWeights
from loquetier_jax.adapters.version import Version
from loquetier_jax.errors import AdapterError, IntegrityError, short


def check_name(name: object) -> None:
    """Raises AdapterError unless `name` is a valid adapter name."""
    if not isinstance(name, str) or not name:
        raise AdapterError(f"name: got {short(name, 200)}, expected a non-empty string")


C = TypeVar("C")


def locked(*names: str) -> Callable[[type[C]], type[C]]:
    """Class decorator: the named methods run under `self.lock`, so that one thread at a time is inside any of them."""

    def one_at_a_time(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            with self.lock:
                return method(self, *args, **kwargs)

        return call

    def decorate(cls: type[C]) -> type[C]:
        for name in names:
            setattr(cls, name, one_at_a_time(getattr(cls, name)))
        return cls

    return decorate


@locked("names", "versions", "get", "rename", "fail", "unpin", "unload")
@locked("hold", "drop", "acquire", "release", "check_integrity")
class Registry:
    """Names, versions and their users; does not deal with weights. Thread-safe.

    A name points to one version. When it is repointed, the old version lives until its last user has released it.

    Attributes:
        on_forget: Called with the id of every version that has been forgotten, in any thread.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._names: dict[str, Version] = {}
        self._versions: dict[int, Version] = {}
        self._pinned: set[str] = set()
        self._ids = itertools.count(1)
        self._clock = itertools.count(1)
        self.on_forget: Callable[[int], Any] = lambda version: None

    def __contains__(self, name: object) -> bool:
        return name in self._names and self._names[name].failure is None

    def names(self) -> list[str]:
        """Names that can serve requests, sorted."""
        return sorted(name for name in self._names if name in self)

    def versions(self) -> list[Version]:
        """All live versions, oldest first: the current ones, and old ones still in use.

        Placeholders of failed names are excluded.
        """
        return [version for version in self._versions.values() if version.failure is None]

    def get(self, name: str) -> Version:
        """The version that `name` points to; for a failed name, a placeholder whose weights raise the reason.

        Raises:
            AdapterError: unknown name.
        """
        if not isinstance(name, str) or name not in self._names:
            raise AdapterError(f"adapter: got {short(name, 200)}, expected one of {self.names()}")
        return self._names[name]

    def is_current(self, version: Version) -> bool:
        """Whether the version's name still points to it."""
        return self._names.get(version.name) is version

    def rename(self, name: str, new: str) -> None:
        """Renames an adapter, keeping its pin; requests in progress are unaffected.

        Raises:
            AdapterError: unknown name, or `new` is in use.
        """
        version = self.get(name)
        self._check_name(new, replace=False)
        failed = self._names.get(new)
        self._names[new] = self._names.pop(name)
        version.name = new
        if failed is not None:
            self._forget_unused(failed)
        if name in self._pinned:
            self._pinned.remove(name)
            self._pinned.add(new)

    def fail(self, name: str, reason: str) -> None:
        """Takes a name out of service after an error: further requests for it raise `reason`; it can be reused.

        Requests that already use its version keep it until they end.

        Raises:
            AdapterError: unknown name.
        """

        def nothing() -> LoraWeights:
            raise AdapterError(reason)

        shape = self.get(name).shape
        self._pinned.discard(name)
        self._point(name, Version(id=next(self._ids), name=name, shape=shape, snapshot=nothing, failure=reason))

    def unpin(self, name: str) -> None:
        """Lets an adapter be evicted again.

        Raises:
            AdapterError: unknown name.
        """
        self.get(name)
        self._pinned.discard(name)

    def is_pinned(self, version: Version) -> bool:
        """Whether the version must stay on the device."""
        return version.name in self._pinned and self.is_current(version)

    def unload(self, name: str) -> None:
        """Removes a name; the version's pages are returned once its last user has released it.

        Raises:
            AdapterError: unknown name.
        """
        version = self.get(name)
        del self._names[name]
        self._pinned.discard(name)
        self._forget_unused(version)

    def hold(self, which: str | Version, count: int = 1) -> Version:
        """Holds a version for `count` waiting requests: it stays alive but may be evicted; see `drop`.

        Args:
            which: A name (its current version), or a living version.
            count: Of how many.

        Raises:
            AdapterError: unknown name, or a version that has been unloaded.
        """
        version = self._alive(which) if isinstance(which, Version) else self.get(which)
        version.holds += count
        return version

    def drop(self, version: Version) -> None:
        """Ends one `hold`.

        Raises:
            IntegrityError: the version is not held.
        """
        if version.holds < 1:
            raise IntegrityError(f"version {version.id} of {version.name!r} is dropped, but is not held")
        version.holds -= 1
        if not version.holds:
            self._unawaited(version)
        self._forget_unused(version)

    def acquire(self, which: str | Version) -> Version:
        """Registers a user whose steps will read the pages, which are not evicted until it calls `release`.

        Args:
            which: A name (meaning its current version), or a live version (one that is held or current).

        Raises:
            AdapterError: unknown name, or a version that has been unloaded.
        """
        version = self._alive(which) if isinstance(which, Version) else self.get(which)
        version.in_flight += 1
        version.last_used = next(self._clock)
        return version

    def release(self, version: Version, epoch: int) -> None:
        """Ends one `acquire`.

        Args:
            version: What `acquire` returned.
            epoch: The last step that this user dispatched with its pages, 0 if none.

        Raises:
            IntegrityError: the version is not acquired.
        """
        if version.in_flight < 1:
            raise IntegrityError(f"version {version.id} of {version.name!r} is released, but is not acquired")
        version.in_flight -= 1
        version.last_epoch = max(version.last_epoch, epoch)
        self._forget_unused(version)

    def check_integrity(self) -> None:
        """Raises IntegrityError unless every live version is in use or current, and every name and pin has one."""
        for version in self._versions.values():
            users = (version.in_flight, version.holds)
            if min(users) < 0 or not self._is_wanted(version):
                raise IntegrityError(f"version {version.id} of {version.name!r} is live with {users} users")
        lost = [name for name, v in self._names.items() if self._versions.get(v.id) is not v]
        if lost or not self._pinned <= self._names.keys():
            raise IntegrityError(f"names {lost} or pins {self._pinned} have no version")

    def _check_name(self, name: str, replace: bool) -> None:
        check_name(name)
        if name in self and not replace:
            raise AdapterError(f"name: adapter {name!r} exists; pass replace=True to add a new version of it")

    def _point(self, name: str, version: Version) -> Version:
        version.last_used = next(self._clock)
        self._versions[version.id] = version
        old = self._names.get(name)
        self._names[name] = version
        if old is not None:
            self._forget_unused(old)
        return version

    def _alive(self, version: Version) -> Version:
        if self._versions.get(version.id) is not version:
            raise AdapterError(f"version {version.id} of adapter {version.name!r} has been unloaded")
        return version

    def _is_wanted(self, version: Version) -> bool:
        return version.in_flight > 0 or version.holds > 0 or self.is_current(version)

    def _forget_unused(self, version: Version) -> None:
        if not self._is_wanted(version):
            self._forget(version)

    def _unawaited(self, version: Version) -> None:
        """Called when nobody holds the version any more."""

    def _forget(self, version: Version) -> None:
        del self._versions[version.id]
        self.on_forget(version.id)
