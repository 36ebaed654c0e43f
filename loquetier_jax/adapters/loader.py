"""Loads adapters in threads of its own, up to a few pages ahead on the device, so that the loop only writes them."""

import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from loquetier_jax.adapters.version import Version
from loquetier_jax.errors import AdapterError, IntegrityError
from loquetier_jax.loop_thread import EngineThread

log = logging.getLogger(__name__)

THREADS = 2  # one reads or casts while the other transfers; more would take the GIL from the loop too often


def start_thread(work: Callable[[], None]) -> None:
    """Starts a thread that ends when there is nothing to load: none is left idle at the end of the process."""
    EngineThread(work, "adapter-loader").start()


class Loader:
    """Loads of versions that somebody waits for, first come, first served; then host copies ahead of time.

    A load makes the version's pages and transfers them to the device, where they are *staged*: in buffers of their own,
    at most `room` pages in all, until the loop takes them, or nobody waits for the version any more.

    Args:
        load: Makes and transfers a version's pages, and returns them; slow, called without the lock.
        warm: Makes its host copy; likewise.
        has_room: Whether another host copy can be kept; no copy is made ahead of time without.
        room: Maximum pages staged or being loaded, unless a single version has more.
        lock: The store's lock.

    Attributes:
        start: Starts a worker, given what it runs; tests replace it, to run loads when they want.
        changed: Called, without the lock, when a load has ended.
        ended: How many have.
    """

    def __init__(
        self,
        load: Callable[[Version], Any],
        warm: Callable[[Version], Any],
        has_room: Callable[[], bool],
        room: int,
        lock: threading.RLock,
    ) -> None:
        self._load, self._make_copy, self._has_room, self._room = load, warm, has_room, room
        self._lock = threading.Condition(lock)
        self._queue: dict[int, Version] = {}  # these four by version id
        self._active: dict[int, Version] = {}
        self._staged: dict[int, tuple[Version, Any]] = {}
        self._errors: dict[int, AdapterError] = {}
        self._ahead: dict[int, Version] = {}
        self._warming = False
        self._workers = 0
        self._closed = False
        self.ended = 0
        self.start: Callable[[Callable[[], None]], None] = start_thread
        self.changed: Callable[[], None] = lambda: None

    @property
    def busy(self) -> bool:
        """Whether a load that somebody waits for is under way, or about to be."""
        with self._lock:
            return bool(self._active) or self._head() is not None

    def request(self, version: Version) -> None:
        """Queues the load of a held version, unless it is queued, under way or staged; forgets an earlier error."""
        with self._lock:
            known = (self._queue, self._active, self._staged)
            if not self._closed and not any(version.id in where for where in known):
                self._errors.pop(version.id, None)
                self._queue[version.id] = version
                self.copy_ahead(version)  # if the load has to wait for room, its host copy need not

    def copy_ahead(self, version: Version) -> None:
        """Makes the host copy of a version when there is nothing more urgent and room to keep it."""
        with self._lock:
            if not self._closed:
                self._ahead[version.id] = version
                self._hire()

    def is_done(self, version: Version) -> bool:
        """Whether `take` has something to return or to raise."""
        return version.id in self._staged or version.id in self._errors

    def take(self, version: Version) -> Any | None:
        """The staged pages of a version, which are no longer staged then; None if it has none.

        Raises:
            AdapterError: its load has failed.
        """
        with self._lock:
            if (error := self._errors.get(version.id)) is not None:
                raise AdapterError(*error.args) from error
            _, pages = self._staged.pop(version.id, (None, None))
            self._hire()
            return pages

    def load_now(self, version: Version) -> None:
        """Loads a held version in this thread, whatever is staged; the caller must not hold the lock.

        Raises:
            AdapterError: its weights cannot be read.
        """
        pages = self._load(version)
        with self._lock:
            if _is_wanted(version) and not self._closed:
                self._queue.pop(version.id, None)
                self._staged[version.id] = version, pages

    def discard(self, version: Version) -> None:
        """Forgets a version that nobody waits for; the result of a load under way will be dropped."""
        with self._lock:
            for where in (self._queue, self._staged, self._errors):
                where.pop(version.id, None)
            self._hire()

    def forget(self, version: Version) -> None:
        """Forgets a version that is no longer live."""
        with self._lock:
            self._ahead.pop(version.id, None)
            self.discard(version)

    def close(self) -> None:
        """Drops all loads and staged pages; returns when those under way have ended. Later requests are ignored."""
        with self._lock:
            self._closed = True
            for where in (self._queue, self._ahead, self._staged, self._errors):
                where.clear()
            self._lock.wait_for(lambda: not self._workers)

    def check_integrity(self) -> None:
        """Raises IntegrityError unless what is staged and under way adds up, and all of it is waited for."""
        with self._lock:
            useless = [v.id for v, _ in self._staged.values() if not _is_wanted(v)]
            useless += [v.id for v in self._queue.values() if not v.holds]
            if useless:
                raise IntegrityError(f"versions {useless} are staged or queued to be loaded, and nobody waits for them")
            twice = (self._queue.keys() & self._active.keys()) | (self._queue.keys() & self._staged.keys())
            if twice:
                raise IntegrityError(f"versions {sorted(twice)} are loaded twice")
            if len(self._active) > self._workers:
                raise IntegrityError(f"{len(self._active)} loads are under way in {self._workers} threads")

    # All below: in a worker, or with the lock held.

    def _head(self) -> Version | None:
        """The next version to load, if there is room for it."""
        while self._queue:
            version = next(iter(self._queue.values()))
            if _is_wanted(version):
                used = sum(v.shape.num_pages for v in (*self._active.values(), *(v for v, _ in self._staged.values())))
                return version if not used or used + version.shape.num_pages <= self._room else None
            del self._queue[version.id]
        return None

    def _hire(self) -> None:
        """Starts a worker if there is work for one more."""
        can_copy = self._ahead and not self._warming and self._has_room()
        if self._workers >= THREADS or not (self._head() or can_copy):
            return
        self._workers += 1
        try:
            self.start(self._work)
        except RuntimeError as error:  # no room for a thread, or the process is ending
            self._workers -= 1
            self.ended += len(self._queue)
            for version in self._queue.values():
                self._errors[version.id] = AdapterError(f"adapter {version.name!r} cannot be loaded: {error}")
            self._queue.clear()

    def _work(self) -> None:
        """A worker's life; it ends when there is nothing to do."""
        ended = False
        try:
            while (job := self._next()) is not None:
                job()
            ended = True
        finally:
            if not ended:  # an interrupt, where `start` runs the work in the calling thread
                self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._workers -= 1
            self._lock.notify_all()

    def _next(self) -> Callable[[], None] | None:
        """The next piece of work; if there is none, the worker counts as gone from then on."""
        with self._lock:
            if (version := self._head()) is not None:
                self._active[version.id] = self._queue.pop(version.id)
                return partial(self._run, version)
            if self._ahead and not self._warming and self._has_room():
                self._warming = True
                return partial(self._copy, self._ahead.pop(next(iter(self._ahead))))
            self._leave()
            return None

    def _run(self, version: Version) -> None:
        pages, error = None, AdapterError(f"adapter {version.name!r}: its load was interrupted")
        try:
            pages, error = self._load(version), None
        except AdapterError as refused:
            error = refused
        except Exception as unforeseen:  # ends the requests that wait for it, and nothing else
            log.exception("adapter %s cannot be loaded", version.name)
            error = AdapterError(f"adapter {version.name!r} cannot be loaded: {unforeseen!r}")
        finally:
            with self._lock:
                del self._active[version.id]
                self.ended += 1
                if _is_wanted(version) and not self._closed:
                    if error is None:
                        self._staged[version.id] = version, pages
                    else:
                        self._errors[version.id] = error
            self.changed()

    def _copy(self, version: Version) -> None:
        try:
            self._make_copy(version)
        except AdapterError as error:  # told to the request that needs it, if any comes
            log.debug("no host copy of adapter %s ahead of time: %s", version.name, error)
        except Exception:
            log.exception("no host copy of adapter %s ahead of time", version.name)
        finally:
            with self._lock:
                self._warming = False


def _is_wanted(version: Version) -> bool:
    return version.holds > 0 and version.pages is None
