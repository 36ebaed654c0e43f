"""Which names there are, which version each points to, and who still uses an older one."""

import functools
import itertools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from loquetier_jax.adapters.version import Version
from loquetier_jax.errors import AdapterError, IntegrityError, short


def check_name(name: object) -> None:
    """Raises AdapterError unless an adapter could be called so."""
    if not isinstance(name, str) or not name:
        raise AdapterError(f"name: got {short(name, 200)}, expected a non-empty string")


C = TypeVar("C")


def locked(*names: str) -> Callable[[type[C]], type[C]]:
    """A class whose methods of these names run under `self.lock`: one thread at a time is inside of any of them."""

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


@locked("names", "versions", "get", "rename", "unload", "hold", "drop", "acquire", "release", "check_integrity")
class Registry:
    """Names, versions and their users; knows nothing of weights. In any thread.

    A name points to one version; when it is pointed to another, the old one lives on until its last user is
    gone.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._names: dict[str, Version] = {}
        self._versions: dict[int, Version] = {}
        self._pinned: set[str] = set()
        self._ids = itertools.count(1)
        self._clock = itertools.count(1)

    def __contains__(self, name: object) -> bool:
        return name in self._names and self._names[name].failure is None

    def names(self) -> list[str]:
        """Names that serve, sorted."""
        return sorted(name for name in self._names if name in self)

    def versions(self) -> list[Version]:
        """All living versions, oldest first: the current ones, and old ones that somebody still uses.

        Placeholders of failed names are left out.
        """
        return [version for version in self._versions.values() if version.failure is None]

    def get(self, name: str) -> Version:
        """The version that `name` points to; of a name that has failed, one whose weights raise why.

        Raises:
            AdapterError: unknown name.
        """
        if not isinstance(name, str) or name not in self._names:
            raise AdapterError(f"adapter: got {short(name, 200)}, expected one of {self.names()}")
        return self._names[name]

    def is_current(self, version: Version) -> bool:
        """Whether its name points to it."""
        return self._names.get(version.name) is version

    def rename(self, name: str, new: str) -> None:
        """Gives an adapter another name, its pin included; requests under way are not disturbed.

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

    def unload(self, name: str) -> None:
        """Takes a name out of service; its pages come back when the last user of its version has released it.

        Raises:
            AdapterError: unknown name.
        """
        version = self.get(name)
        del self._names[name]
        self._pinned.discard(name)
        self._forget_unused(version)

    def hold(self, name: str, count: int = 1) -> Version:
        """The current version, for `count` requests that wait: it is kept alive, but may be evicted; see `drop`.

        Raises:
            AdapterError: unknown name.
        """
        version = self.get(name)
        version.holds += count
        return version

    def drop(self, version: Version) -> None:
        """Ends one `hold`.

        Raises:
            IntegrityError: nobody holds it.
        """
        if version.holds < 1:
            raise IntegrityError(f"version {version.id} of {version.name!r} is dropped, but nobody holds it")
        version.holds -= 1
        self._forget_unused(version)

    def acquire(self, which: str | Version) -> Version:
        """Registers a user whose steps will read the pages: while there is one, they are not evicted.

        Args:
            which: A name (its current version), or a living version (one that is held, or current).

        Raises:
            AdapterError: unknown name, or a version that is no more.
        """
        version = self._alive(which) if isinstance(which, Version) else self.get(which)
        version.in_flight += 1
        version.last_used = next(self._clock)
        return version

    def release(self, version: Version, epoch: int) -> None:
        """Ends one `acquire`.

        Args:
            version: What `acquire` returned.
            epoch: The last step dispatched with its pages by this user, 0 when there was none.

        Raises:
            IntegrityError: nobody has acquired it.
        """
        if version.in_flight < 1:
            raise IntegrityError(f"version {version.id} of {version.name!r} is released, but nobody has it")
        version.in_flight -= 1
        version.last_epoch = max(version.last_epoch, epoch)
        self._forget_unused(version)

    def check_integrity(self) -> None:
        """Raises IntegrityError unless every living version is wanted, and every name and pin has one."""
        for version in self._versions.values():
            users = (version.in_flight, version.holds)
            if min(users) < 0 or not self._is_wanted(version):
                raise IntegrityError(f"version {version.id} of {version.name!r} lives with {users} users")
        lost = [name for name, v in self._names.items() if self._versions.get(v.id) is not v]
        if lost or not self._pinned <= self._names.keys():
            raise IntegrityError(f"names {lost} or pins {self._pinned} have no version")

    def _check_name(self, name: str, replace: bool) -> None:
        check_name(name)
        if name in self and not replace:
            raise AdapterError(f"name: adapter {name!r} exists; pass replace=True for a new version of it")

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
            raise AdapterError(f"version {version.id} of adapter {version.name!r} is no more")
        return version

    def _is_wanted(self, version: Version) -> bool:
        return version.in_flight > 0 or version.holds > 0 or self.is_current(version)

    def _forget_unused(self, version: Version) -> None:
        if not self._is_wanted(version):
            self._forget(version)

    def _forget(self, version: Version) -> None:
        del self._versions[version.id]
