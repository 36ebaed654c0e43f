"""Threads that work for an engine, and end with the process."""

import threading
from collections.abc import Callable
from contextlib import suppress
from weakref import WeakMethod

from loquetier_jax.errors import EngineError


class EngineThread(threading.Thread):
    """A thread that works for an engine, and wants nothing of it: it keeps no loop going.

    No daemon, whoever starts it: an interpreter that ends while the device is read is aborted.

    Args:
        run: What it does; None where a subclass says it.
        name: For debuggers.
    """

    def __init__(self, run: Callable[[], None] | None, name: str) -> None:
        super().__init__(target=run, name=name, daemon=False)


class LoopThread(EngineThread):
    """Drives an engine's loop until it is ended, the driver is dropped or fails, or the process ends.

    It holds the driver only during a step.

    Args:
        step: `Driver.step`.
        seconds_to_rest: How long to wait for `changed` when a step had nothing to do.
        changed: Notified when there may be something to do.
    """

    def __init__(
        self, step: Callable[[], bool], seconds_to_rest: Callable[[], float], changed: threading.Condition
    ) -> None:
        super().__init__(None, "loquetier-loop")
        self._step, self._seconds, self._changed = WeakMethod(step), WeakMethod(seconds_to_rest), changed
        self._ending = False
        self._resting = threading.Event()

    def start(self) -> None:
        """Returns once it rests, or has found something to do: from then on it does not keep the driver alive."""
        super().start()
        self._resting.wait()

    def run(self) -> None:
        """Called by `start`."""
        worked = False
        with suppress(EngineError):  # those who wait are told
            while not self._ending and _process_goes_on():
                if not worked and not self._rest():
                    return
                step = self._step()
                if step is None:
                    return
                worked = step()
                del step
        self._resting.set()

    def _rest(self) -> bool:
        """Waits for something to do, for a while; False when the driver is gone."""
        seconds_to_rest = self._seconds()
        if seconds_to_rest is None:
            return False
        seconds = seconds_to_rest()
        del seconds_to_rest
        self._resting.set()
        with self._changed:
            if not self._ending:
                self._changed.wait(seconds)
        return True

    def end(self, wake: Callable[[], None]) -> None:
        """Returns once it has ended, between two steps."""
        self._ending = True
        wake()
        self.join()


def _process_goes_on() -> bool:
    """Whether anybody is left who may want something: at its end the interpreter waits for threads like this one."""
    if threading.main_thread().is_alive():
        return True
    return any(t.is_alive() and not t.daemon and not isinstance(t, EngineThread) for t in threading.enumerate())
