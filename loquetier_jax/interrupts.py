"""Handles Ctrl-C, and SIGTERM for commands that want it, between steps and never inside one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Defers a KeyboardInterrupt to the end of the block; a second one is delivered at once.

    Inside a step it could hit between a call that donates buffers and the assignment of the new ones, which would lose
    the engine. Only the main thread receives it; in other threads this does nothing.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    held: list[tuple[Any, ...]] = []

    def hold(*args: Any) -> None:
        if held:
            handler(*args)
        held.append(args)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if held:
        handler(*held[0])


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Appends SIGINT or SIGTERM (from `kill`, Slurm, a stopping container) to the yielded list instead of raising.

    The block polls the list and saves its work. A second signal has its usual effect.
    """
    caught: list[int] = []

    def restore() -> None:
        for signum, handler in before.items():
            signal.signal(signum, handler)

    def catch(signum: int, _frame: Any) -> None:
        caught.append(signum)
        restore()

    before = {signum: signal.signal(signum, catch) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        restore()
