"""Ctrl-C, and SIGTERM where a command asks for it: between two steps, never inside one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds a KeyboardInterrupt back until the block has ended; a second one comes through at once.

    Inside a step it would fall between a call that took the buffers over and the line that keeps the new ones: the
    engine would be lost. Other threads than the main one never get it, and have nothing to hold back.
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
    """Ctrl-C or SIGTERM (of `kill`, Slurm, a container that is stopped) puts its signal into the list.

    Whoever runs the block looks there, and saves. A second signal does what the first would have done outside.
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
