"""A first-come, first-served reentrant lock."""

import threading


class FairLock:
    """A reentrant lock without starvation: a thread that releases it and asks again queues behind those waiting.

    `threading.RLock` guarantees no order: a loop that releases it for an instant per iteration may always win it back.
    """

    def __init__(self) -> None:
        self._turnstile, self._lock = threading.Lock(), threading.Lock()
        self._owner: int | None = None
        self._depth = 0

    @property
    def owned(self) -> bool:
        """Whether this thread holds the lock."""
        return self._owner == threading.get_ident()

    def acquire(self, blocking: bool = True) -> bool:
        """Acquires the lock, or with blocking=False only if it is free. Returns whether it was acquired."""
        me = threading.get_ident()
        if self._owner != me:  # safe to read unlocked: only this thread ever sets it to `me`
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
        """Releases the lock; raises RuntimeError in a thread that does not hold it."""
        if self._owner != threading.get_ident():
            raise RuntimeError("FairLock: released by a thread that does not hold it")
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self._lock.release()

    def __enter__(self) -> "FairLock":
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
