"""A lock that comes to those who ask for it in turn."""

import threading


class FairLock:
    """A reentrant lock under which nobody starves: whoever releases it and asks again waits behind those who wait.

    `threading.RLock` promises no order: a loop that releases it for an instant in each round gets it back every time.
    """

    def __init__(self) -> None:
        self._turnstile, self._lock = threading.Lock(), threading.Lock()
        self._owner: int | None = None
        self._depth = 0

    def acquire(self, blocking: bool = True) -> bool:
        """Takes the lock; without `blocking`, only if it can be had at once. Returns whether it was taken."""
        me = threading.get_ident()
        if self._owner != me:  # only this thread could have made it equal
            if not self._turnstile.acquire(blocking):
                return False
            try:
                if not self._lock.acquire(blocking):
                    return False
            finally:
                self._turnstile.release()
            self._owner = me
        self._depth += 1
        return True

    def release(self) -> None:
        """Gives the lock back; raises RuntimeError in a thread that does not have it."""
        if self._owner != threading.get_ident():
            raise RuntimeError("FairLock: released by a thread that does not have it")
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self._lock.release()

    def __enter__(self) -> "FairLock":
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
