"""Compiles in background threads, so that serving continues meanwhile."""

import logging
import threading
from collections.abc import Callable, Hashable

log = logging.getLogger(__name__)


class BackgroundCompiler:
    """Compiles functions, each in its own thread."""

    def __init__(self) -> None:
        self._threads: dict[Hashable, threading.Thread] = {}
        self._errors: dict[Hashable, Exception] = {}
        self._ready: set[Hashable] = set()

    def request(self, key: Hashable, build: Callable[[], None]) -> None:
        """Starts `build` in a new thread, unless this key has been requested before."""
        if key in self._threads:
            return

        def run() -> None:
            try:
                build()
                self._ready.add(key)
            except Exception as error:  # raised later by `ready`
                log.exception("compiling %s failed", key)
                self._errors[key] = error

        # Not a daemon: the interpreter aborts if it exits while XLA compiles.
        self._threads[key] = threading.Thread(target=run, name="compile")
        self._threads[key].start()

    def ready(self, key: Hashable) -> bool:
        """Whether `build` has finished.

        Raises:
            Exception: the one that `build` raised.
        """
        if key in self._errors:
            raise self._errors[key]
        return key in self._ready

    def forget(self, key: Hashable) -> None:
        """Forgets a key whose build has ended, including its error, so that it may be requested again."""
        if key in self._threads and not self._threads[key].is_alive():
            del self._threads[key]
            self._errors.pop(key, None)
            self._ready.discard(key)

    @property
    def busy(self) -> bool:
        """Whether something is being compiled."""
        return any(thread.is_alive() for thread in list(self._threads.values()))

    def wait(self) -> None:
        """Waits until nothing is being compiled."""
        for thread in list(self._threads.values()):
            thread.join()
