"""The thread of `Engine.start`."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from weakref import WeakMethod

from loquetier_jax.errors import EngineError

POLL_S = 0.005  # between looks at what does not tell: a compile that ends, a job that is resumed
IDLE_S = 0.25  # between looks at whether the engine or the process has ended


class LoopThread(threading.Thread):
    """Drives an engine's loop until it is ended, the engine is dropped or fails, or the process ends.

    It holds the engine only during a step. No daemon: an interpreter that ends while the device works is aborted.

    Args:
        step: `Engine.step`.
        idle: `Loop.is_idle` of its loop: whether there can be nothing to do before `changed` is notified.
        changed: Notified when there may be something to do.
    """

    def __init__(self, step: Callable[[], bool], idle: Callable[[], bool], changed: threading.Condition) -> None:
        super().__init__(name="loquetier-loop")
        self._step, self._idle, self._changed = WeakMethod(step), WeakMethod(idle), changed
        self._ending = False

    def run(self) -> None:
        """Called by `start`."""
        worked = False
        with suppress(EngineError):  # those who wait are told
            while not self._ending and _process_goes_on():
                if worked:
                    time.sleep(1e-4)  # a lock is not fair: who wants to submit must get it between two steps
                elif not self._rest():
                    return
                step = self._step()
                if step is None:
                    return
                worked = step()
                del step

    def _rest(self) -> bool:
        """Waits for something to do, for a while; False when the engine is gone."""
        with self._changed:
            idle = self._idle()
            if idle is None:
                return False
            seconds = IDLE_S if idle() else POLL_S
            del idle
            self._changed.wait(seconds)
        return True

    def end(self) -> None:
        """Returns once it has ended, between two steps."""
        self._ending = True
        with self._changed:
            self._changed.notify_all()
        self.join()


def _process_goes_on() -> bool:
    """Whether anybody is left who may want something: at its end the interpreter waits for threads like this one."""
    if threading.main_thread().is_alive():
        return True
    return any(t.is_alive() and not t.daemon and not isinstance(t, LoopThread) for t in threading.enumerate())
