"""Drives an engine's loop and synchronises other threads with it: the inbox, the lock, the loop thread."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from loquetier_jax.errors import EngineError
from loquetier_jax.fair_lock import FairLock
from loquetier_jax.interrupts import uninterrupted
from loquetier_jax.loop_thread import LoopThread

log = logging.getLogger(__name__)

POLL_S = 0.005  # poll interval for events that do not notify: a finished compile, a resumed job
IDLE_S = 0.25  # poll interval, when idle, for the end of the engine or the process


class Drivable(Protocol):
    """What a Driver drives; `runtime.loop.Loop` is one."""

    def iterate(self) -> bool:
        """Runs one iteration, releasing the lock while the device works; returns whether there was work."""

    def drain(self) -> None:
        """Reads the results of everything dispatched."""

    def is_idle(self) -> bool:
        """Whether there is no work until the next command."""

    def fail(self, message: str) -> None:
        """Ends every request and job with an error."""


class Driver:
    """Runs iterations, one at a time, and delivers commands to them.

    The state it works on (queues, jobs, pages) is touched only under `lock`. An iteration holds the lock while
    the host decides, dispatches and delivers results, but not while it waits for the device: other threads wait for a
    few milliseconds of host work, never for a step. `post` does not wait even for those.

    Args:
        lock: The loop's lock.
        background: Whether other threads are at work that the loop may be waiting for: a compile, a save.
    """

    def __init__(self, lock: FairLock, background: Callable[[], bool]) -> None:
        self.lock = lock
        self._background = background
        self._loop: Drivable | None = None
        self._inbox: deque[Callable[[], None]] = deque()
        self._driving = threading.Lock()
        self._driver: int | None = None  # id of the thread inside an iteration
        self._changed = threading.Condition()
        self._changes = 0
        self._thread: LoopThread | None = None
        self._failure: BaseException | None = None
        self.closed = False

    def close(self) -> None:
        """Marks the engine as closed; calls that need it raise EngineError from now on."""
        with self.lock:
            self.closed = True
        self.notify()

    def drive(self, loop: Drivable) -> None:
        """Sets the loop to drive; called once, before anything else."""
        self._loop = loop

    # Commands.

    def post(self, command: Callable[[], None]) -> None:
        """Queues a command, to run under the lock and in order: at once if the lock is free, else before the next step.

        Args:
            command: Short; must not raise.
        """
        self._inbox.append(command)
        if self.lock.acquire(blocking=False):
            try:
                self.empty_inbox()
            finally:
                self.lock.release()
        self.notify()

    def empty_inbox(self) -> None:
        """Runs the queued commands; the caller holds the lock."""
        while self._inbox:
            self._inbox.popleft()()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Holds the lock of an open engine, with all earlier commands executed.

        Raises:
            EngineError: the engine was closed.
        """
        with self.lock:
            self.check_open()
            self.empty_inbox()
            yield

    def notify(self) -> None:
        """Wakes the threads waiting for a change."""
        with self._changed:
            self._changes += 1
            self._changed.notify_all()

    # Iterations.

    @property
    def failure(self) -> BaseException | None:
        """The exception of the step that failed, or None."""
        return self._failure

    def check_open(self) -> None:
        """Raises EngineError if the engine has been closed."""
        if self.closed:
            raise EngineError("engine: already closed; create a new one, e.g. with Engine.from_pretrained")

    def check_alive(self) -> None:
        """Raises EngineError if the engine has been closed or a step has failed."""
        self.check_open()
        if self._failure is not None:
            raise EngineError(f"engine: a step has failed: {self._failure!r}") from self._failure

    def step(self) -> bool:
        """Drives the loop once; returns whether there was any work.

        Raises:
            EngineError: a step has failed, now or earlier; all requests and jobs have ended with that error.
            RuntimeError: called from inside a step, i.e. by a listener; other requests' tokens would be out of order.
        """
        with self._iteration():
            with self.lock:
                self.empty_inbox()
            worked = self._loop.iterate()
            with self.lock:
                return worked or bool(self._inbox)

    def drain(self) -> None:
        """Reads the results of everything dispatched, leaving the device idle. Raises what `step` raises."""
        with self._iteration():
            self._loop.drain()

    @contextmanager
    def _iteration(self) -> Iterator[None]:
        """Critical section around dispatches and reads. An exception inside is fatal: donated buffers may be gone."""
        self._refuse_inside()
        with self._driving:
            self.check_alive()
            self._driver = threading.get_ident()
            try:
                with uninterrupted():
                    try:
                        yield
                    except BaseException as error:
                        self._lose(error)
                        if not isinstance(error, Exception):
                            raise
                        self.check_alive()
            finally:
                self._driver = None
                with self.lock:
                    self.empty_inbox()
                self.notify()

    def _lose(self, error: BaseException) -> None:
        log.error("a step has failed", exc_info=error)
        with self.lock:
            self._failure = error
            self.empty_inbox()
            self._loop.fail(f"a step of the engine has failed: {error!r}")

    def _refuse_inside(self) -> None:
        if self._driver == threading.get_ident():
            raise RuntimeError("engine: called from a listener, which may submit and cancel but not wait for steps")

    def wait(self, done: Callable[[], bool]) -> None:
        """Drives the loop, or waits for the loop thread to, until `done()`.

        Raises:
            EngineError: a step has failed, in this thread or another.
            RuntimeError: there is no work left and `done()` is still false, or called from inside a step.
        """
        while True:
            with self._changed:
                seen = self._changes
            if done():
                return
            self._refuse_inside()
            if self._thread is not None and self._thread.is_alive():  # it may end before threads that outlive main
                with self._changed:
                    if self._changes == seen:
                        self._changed.wait(0.1)
                if self._failure is not None or self.closed:  # before done(), which a failure makes true as well
                    self.check_alive()
                continue
            background = self._background()  # asked before the step: the next one uses what it finishes meanwhile
            if not self.step():
                if not (background or self._background() or done()):
                    raise RuntimeError("engine: there is no work left, but the awaited result has not arrived")
                time.sleep(POLL_S)

    # The thread.

    def start(self) -> None:
        """Runs the loop in its own thread until `stop`, the end of the process, or the driver is garbage-collected."""
        with self.entered():
            begins = self._thread is None
            if begins:
                self._thread = LoopThread(self.step, self._seconds_to_rest, self._changed)
        if begins:  # without the lock, which it takes
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread of `start`; queued work stays queued."""
        self._refuse_inside()
        if self._thread is not None:
            self._thread.end(self.notify)
            self._thread = None

    def _seconds_to_rest(self) -> float:
        """Seconds to wait for a notification after an iteration without work."""
        with self.lock:
            return IDLE_S if self._loop.is_idle() and not self._inbox else POLL_S
