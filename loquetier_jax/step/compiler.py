"""Compiling on threads of its own, so that serving goes on meanwhile."""

import logging
import threading
from collections.abc import Callable, Hashable

log = logging.getLogger(__name__)


class BackgroundCompiler:
    """Builds compiled functions, each on a thread of its own."""

    def __init__(self) -> None:
        self._threads: dict[Hashable, threading.Thread] = {}
        self._errors: dict[Hashable, Exception] = {}
        self._ready: set[Hashable] = set()

    def request(self, key: Hashable, build: Callable[[], None]) -> None:
        """Starts `build` unless it has been asked for under this key before."""
        if key in self._threads:
            return

        def run() -> None:
            try:
                build()
                self._ready.add(key)
            except Exception as error:  # handed to whoever asks: a thread has no caller to raise to
                log.exception("compiling %s failed", key)
                self._errors[key] = error

        # No daemon: an interpreter that ends while XLA compiles is aborted.
        self._threads[key] = threading.Thread(target=run, name="compile")
        self._threads[key].start()

    def ready(self, key: Hashable) -> bool:
        """Whether `build` has finished.

        Raises:
            Exception: what it failed with.
        """
        if key in self._errors:
            raise self._errors[key]
        return key in self._ready

    def forget(self, key: Hashable) -> None:
        """Drops what is known of a key whose build has ended, its error included; it may be asked for again."""
        if key in self._threads and not self._threads[key].is_alive():
            del self._threads[key]
            self._errors.pop(key, None)
            self._ready.discard(key)

    @property
    def busy(self) -> bool:
        """Whether something is being compiled."""
        return any(thread.is_alive() for thread in self._threads.values())

    def wait(self) -> None:
        """Returns when nothing is being compiled."""
        for thread in list(self._threads.values()):
            thread.join()
