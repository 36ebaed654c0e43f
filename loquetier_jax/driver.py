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
from loquetier_jax.loop_thread import LoopThread, Signal

log = logging.getLogger(__name__)

POLL_S = 0.005  # poll interval for events that do not notify: a finished compile, a resumed job
IDLE_S = 0.25  # poll interval, when idle, for the end of the engine or the process


class Drivable(Protocol):
    """What a Driver drives; `runtime.loop.Loop` is one."""

    lock: FairLock

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
        loop: What is driven.
        background: Whether other threads are at work that the loop may be waiting for: a compile, a save.
        loads: Whether adapters are being loaded for requests, and how many loads have ended, which is notified.
    """

    def __init__(
        self,
        loop: Drivable,
        background: Callable[[], bool],
        loads: Callable[[], tuple[bool, int]] = lambda: (False, 0),
    ) -> None:
        self.lock = loop.lock
        self._background, self._loads = background, loads
        self._loop = loop
        self._inbox: deque[Callable[[], None]] = deque()
        self._driving = threading.Lock()
        self._driver: int | None = None  # id of the thread inside an iteration
        self._changed = Signal()
        self._thread: LoopThread | None = None
        self._failure: BaseException | None = None
        self._closer: int | None = None  # id of the thread that closes the engine
        self.closed = False

    def begin_closing(self) -> bool:
        """From now on calls of other threads raise EngineError; False if another one closes: it has done so then."""
        with self.lock:
            mine = self._closer is None
            self._closer = threading.get_ident() if mine else self._closer
        while not (mine or self.closed):
            self._changed.wait(self._changed.count, 0.1)
        return mine

    def close(self) -> None:
        """Marks the engine as closed; calls that need it raise EngineError from now on."""
        with self.lock:
            self.closed = True
        self.notify()

    # Commands.

    def post(self, command: Callable[[], None]) -> None:
        """Queues a command, to run under the lock and in order: at once if the lock is free, else before the next step.

        Args:
            command: Short; must not raise.
        """
        self._inbox.append(command)
        # A thread that holds the lock may be in the middle of a decision: of a listener, or of a collected iterator.
        if not self.lock.owned and self.lock.acquire(blocking=False):
            try:
                self.empty_inbox()
            finally:
                self.lock.release()
        self.notify()

    def empty_inbox(self) -> None:
        """Runs the queued commands; the caller holds the lock."""
        while self._inbox:
            command = self._inbox.popleft()
            try:
                command()
            except Exception:  # a bug of the command, which must not end the loop for all others
                log.exception("a command to the loop has failed")

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
        self._changed.notify()

    # Iterations.

    @property
    def failure(self) -> BaseException | None:
        """The exception of the step that failed, or None."""
        return self._failure

    def check_open(self) -> None:
        """Raises EngineError if the engine has been closed."""
        if self.closed or self._closer not in (None, threading.get_ident()):
            raise EngineError("engine: already closed; create a new one, e.g. with Engine.from_pretrained")

    def check_alive(self) -> None:
        """Raises EngineError if the engine has been closed or a step has failed."""
        self.check_open()
        if self._failure is not None:
            raise EngineError(f"engine: a step has failed: {self._failure!r}") from self._failure

    def step(self) -> bool:
        """Drives the loop once; returns whether there was any work.

        If all there is has to wait for an adapter that is being loaded, that counts as work: waits a little for it.

        Raises:
            EngineError: a step has failed, now or earlier; all requests and jobs have ended with that error.
            RuntimeError: called from inside a step, i.e. by a listener; other requests' tokens would be out of order.
        """
        _, ended = self._loads()
        with self._iteration():
            seen = self._changed.count
            with self.lock:
                self.empty_inbox()
            worked = self._loop.iterate() or bool(self._inbox)
        if not worked:
            loading, now_ended = self._loads()
            worked = loading or now_ended != ended  # one that ended meanwhile may have been too late for the iteration
            if worked:
                self._changed.wait(seen + 1, POLL_S)  # the iteration's own notification is not what it waits for
        return worked

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
                with self.lock:
                    self.empty_inbox()
                self._driver = None
                self.notify()

    def _lose(self, error: BaseException) -> None:
        log.error("a step has failed", exc_info=error)
        with self.lock:
            self._failure = error
            self.empty_inbox()
            self._loop.fail(f"a step of the engine has failed: {error!r}")

    def _refuse_inside(self) -> None:
        if self._driver == threading.get_ident() or self.lock.owned:
            raise RuntimeError("engine: called from a listener, which may submit and cancel but not wait for steps")

    def wait(self, done: Callable[[], bool]) -> None:
        """Drives the loop, or waits for the loop thread to, until `done()`.

        Raises:
            EngineError: a step has failed, in this thread or another.
            RuntimeError: there is no work left and `done()` is still false, or called from inside a step.
        """
        while True:
            seen = self._changed.count
            if done():
                return
            self._refuse_inside()
            if self._thread is not None and self._thread.is_alive():  # it may end before threads that outlive main
                self._changed.wait(seen, 0.1)
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
        self._refuse_inside()
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
            self._thread.end()
            self._thread = None

    def _seconds_to_rest(self) -> float:
        """Seconds to wait for a notification after an iteration without work."""
        with self.lock:
            return IDLE_S if self._loop.is_idle() and not self._inbox else POLL_S
