"""Threads that work for an engine and end with the process."""

import threading
from collections.abc import Callable
from contextlib import suppress
from weakref import WeakMethod

from loquetier_jax.errors import EngineError


class EngineThread(threading.Thread):
    """A thread that works for an engine. It does not need the loop, so it does not keep one running at exit.

    Never a daemon: the interpreter aborts if it exits while a daemon thread reads from the device.

    Args:
        run: The thread's work; None if a subclass overrides `run`.
        name: The thread's name.
    """

    def __init__(self, run: Callable[[], None] | None, name: str) -> None:
        super().__init__(target=run, name=name, daemon=False)


class Signal:
    """Tells that something has changed: a condition with a count, so that no change is missed before a wait."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self.count = 0

    def notify(self) -> None:
        """Wakes the threads that wait."""
        with self._condition:
            self.count += 1
            self._condition.notify_all()

    def wait(self, seen: int, seconds: float) -> None:
        """Waits for a change after the one that was number `seen`, for at most so many seconds."""
        with self._condition:
            if self.count == seen:
                self._condition.wait(seconds)


class LoopThread(EngineThread):
    """Drives an engine's loop until `end`, a failed step, the end of the process, or the driver is garbage-collected.

    References the driver only during a step.

    Args:
        step: `Driver.step`.
        seconds_to_rest: Gives the seconds to wait for `changed` after a step without work.
        changed: Notified when there may be work.
    """

    def __init__(self, step: Callable[[], bool], seconds_to_rest: Callable[[], float], changed: Signal) -> None:
        super().__init__(None, "loquetier-loop")
        self._step, self._seconds, self._changed = WeakMethod(step), WeakMethod(seconds_to_rest), changed
        self._ending = False
        self._resting = threading.Event()  # set once the thread has first waited

    def start(self) -> None:
        """Starts the thread; returns once it waits or has ended, so that it no longer keeps the driver alive."""
        super().start()
        self._resting.wait()

    def run(self) -> None:
        """Called by `start`."""
        worked = False
        with suppress(EngineError):  # reported to the waiting threads by `Driver.wait`
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
        """Waits a while for work; False when the driver is gone."""
        seen, seconds_to_rest = self._changed.count, self._seconds()
        if seconds_to_rest is None:
            return False
        seconds = seconds_to_rest()
        del seconds_to_rest
        self._resting.set()
        if not self._ending:
            self._changed.wait(seen, seconds)
        return True

    def end(self) -> None:
        """Ends the thread between two steps; returns when it has ended."""
        self._ending = True
        self._changed.notify()
        self.join()


def _process_goes_on() -> bool:
    """Whether another thread may still need the loop; at exit the interpreter waits for threads like this one."""
    if threading.main_thread().is_alive():
        return True
    return any(t.is_alive() and not t.daemon and not isinstance(t, EngineThread) for t in threading.enumerate())
