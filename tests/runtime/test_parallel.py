"""Jobs in a few threads: all run, errors come out as themselves, Ctrl-C ends them, settings of the caller hold."""

import signal
import threading
from collections.abc import Callable

import jax
import pytest

from loquetier_jax.runtime.parallel import run_in_parallel


def test_all_jobs_run_at_once_and_are_counted_in_the_callers_thread() -> None:
    together, counted = threading.Barrier(3, timeout=10), []
    run_in_parallel([together.wait] * 3, lambda: counted.append(threading.current_thread()), threads=3)
    assert counted == [threading.current_thread()] * 3
    run_in_parallel([], lambda: counted.append(None))
    assert len(counted) == 3


def test_an_error_comes_out_as_itself_and_the_rest_is_not_begun() -> None:
    begun = []

    def fail() -> None:
        raise KeyError("a kernel")

    with pytest.raises(KeyError, match="a kernel"):
        run_in_parallel([fail, *[lambda: begun.append(1)] * 1000], lambda: None, threads=1)
    assert not begun


def test_an_interrupt_waits_for_what_has_begun() -> None:
    """The interpreter must not end while XLA compiles."""
    waits, interrupted, ended = threading.Event(), threading.Event(), threading.Event()

    def interrupt(*_: object) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    def job() -> None:
        assert waits.wait(10)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # while it waits for this job
        assert interrupted.wait(10)
        ended.set()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_in_parallel([lambda: None, job], waits.set)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.is_set()


@pytest.mark.parametrize(
    ("setting", "read"),
    [
        (lambda: jax.default_matmul_precision("highest"), lambda: jax.config.jax_default_matmul_precision),
        (lambda: jax.default_device(jax.devices()[0]), lambda: jax.config.jax_default_device),
    ],
    ids=["precision", "device"],
)
def test_jobs_see_what_the_caller_has_set(setting: Callable, read: Callable) -> None:
    seen = []
    with setting():
        expected = read()
        run_in_parallel([lambda: seen.append(read())], lambda: None)
    assert seen == [expected] and read() != expected
