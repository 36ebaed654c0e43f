"""Who drives an engine's loop, and how others reach what it works on: the inbox, the lock, the thread."""

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

POLL_S = 0.005  # between looks at what does not tell: a compile that ends, a job that is resumed
IDLE_S = 0.25  # between looks at whether the engine or the process has ended


class Drivable(Protocol):
    """What a Driver drives; `runtime.loop.Loop` is one."""

    def iterate(self) -> bool:
        """Runs one iteration, holding the lock except while the device works; whether there was anything to do."""

    def drain(self) -> None:
        """Reads everything dispatched."""

    def is_idle(self) -> bool:
        """Whether there will be nothing to do before a command comes."""

    def fail(self, message: str) -> None:
        """Ends every request and job with an error."""


class Driver:
    """Runs iterations, one at a time, and hands commands to them.

    What an iteration works on (queues, jobs, pages) is touched under `lock` alone. An iteration holds it while the host
    decides, dispatches and hands results out, and not while it waits for the device: who takes the lock waits for a few
    milliseconds of host work, never for a step. `post` does not wait even for those.

    Args:
        lock: Of the loop.
        background: Whether something goes on in other threads that the loop may be waiting for: a compile, a save.
    """

    def __init__(self, lock: FairLock, background: Callable[[], bool]) -> None:
        self.lock = lock
        self._background = background
        self._loop: Drivable | None = None
        self._inbox: deque[Callable[[], None]] = deque()
        self._driving = threading.Lock()
        self._driver: int | None = None  # the thread that is inside an iteration
        self._changed = threading.Condition()
        self._changes = 0
        self._thread: LoopThread | None = None
        self._failure: BaseException | None = None
        self.closed = False

    def close(self) -> None:
        """Says that the engine is closed: whatever needs it raises EngineError from now on."""
        with self.lock:
            self.closed = True
        self.notify()

    def drive(self, loop: Drivable) -> None:
        """Says what is driven; once, before anything else."""
        self._loop = loop

    # Commands.

    def post(self, command: Callable[[], None]) -> None:
        """Leaves a command, which runs under the lock, in order: now where that is free, else before the next decision.

        Args:
            command: Raises nothing; short.
        """
        self._inbox.append(command)
        if self.lock.acquire(blocking=False):
            try:
                self.empty_inbox()
            finally:
                self.lock.release()
        self.notify()

    def empty_inbox(self) -> None:
        """Runs the commands that were left; the caller has the lock."""
        while self._inbox:
            self._inbox.popleft()()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The lock, of an engine that is open, all earlier commands done.

        Raises:
            EngineError: the engine was closed.
        """
        with self.lock:
            self.check_open()
            self.empty_inbox()
            yield

    def notify(self) -> None:
        """Wakes those who wait for something to change."""
        with self._changed:
            self._changes += 1
            self._changed.notify_all()

    # Iterations.

    @property
    def failure(self) -> BaseException | None:
        """What a step has failed with, if one has."""
        return self._failure

    def check_open(self) -> None:
        """Raises EngineError once the engine was closed."""
        if self.closed:
            raise EngineError("engine: it was closed; make a new one, e.g. by Engine.from_pretrained")

    def check_alive(self) -> None:
        """Raises EngineError once the engine was closed, or a step has failed."""
        self.check_open()
        if self._failure is not None:
            raise EngineError(f"engine: a step has failed: {self._failure!r}") from self._failure

    def step(self) -> bool:
        """Drives the loop once; returns whether there was anything to do.

        Raises:
            EngineError: a step has failed, now or before. Its requests and jobs have ended with that error.
            RuntimeError: called from inside a step, i.e. by a listener: tokens of others would come out of order.
        """
        with self._iteration():
            with self.lock:
                self.empty_inbox()
            worked = self._loop.iterate()
            with self.lock:
                return worked or bool(self._inbox)

    def drain(self) -> None:
        """Reads everything dispatched: afterwards the device is idle. Raises what `step` raises."""
        with self._iteration():
            self._loop.drain()

    @contextmanager
    def _iteration(self) -> Iterator[None]:
        """Critical section around whatever reads or dispatches. An exception inside is fatal: buffers may be gone."""
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
            raise RuntimeError("engine: called from a listener, which may submit and cancel, but not wait for steps")

    def wait(self, done: Callable[[], bool]) -> None:
        """Drives the loop, or waits for the thread that does, until `done()`.

        Raises:
            EngineError: a step has failed, whoever drove it.
            RuntimeError: nothing is left to do and `done()` is still false, or called from inside a step.
        """
        while True:
            with self._changed:
                seen = self._changes
            if done():
                return
            self._refuse_inside()
            if self._thread is not None and self._thread.is_alive():  # it ends before threads that outlive the main one
                with self._changed:
                    if self._changes == seen:
                        self._changed.wait(0.1)
                if self._failure is not None or self.closed:  # a failure ends what was waited for, too: told first
                    self.check_alive()
                continue
            background = self._background()  # asked first: what it finishes during the step is seen by the next one
            if not self.step():
                if not (background or self._background() or done()):
                    raise RuntimeError("engine: nothing is left to do, and what was waited for has not happened")
                time.sleep(POLL_S)

    # The thread.

    def start(self) -> None:
        """Gives the loop a thread of its own; see `stop`. It ends with the process, and when the driver is dropped."""
        with self.entered():
            begins = self._thread is None
            if begins:
                self._thread = LoopThread(self.step, self._seconds_to_rest, self._changed)
        if begins:  # without the lock, which it takes
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread of `start`; what is queued stays queued."""
        self._refuse_inside()
        if self._thread is not None:
            self._thread.end(self.notify)
            self._thread = None

    def _seconds_to_rest(self) -> float:
        """How long to wait for a notification after an iteration without work."""
        with self.lock:
            return IDLE_S if self._loop.is_idle() and not self._inbox else POLL_S
