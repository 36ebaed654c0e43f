"""Runs jobs in a few threads, as compiling wants it: XLA works without the interpreter lock, tracing does not."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

import jax

MOST_THREADS = 8  # a large model's forward takes the compiler 1 to 2 GB of host memory


def run_in_parallel(jobs: Sequence[Callable[[], Any]], finished: Callable[[], None], threads: int = 0) -> None:
    """Runs all jobs, in this order as far as threads allow, and returns when all have ended.

    Compiling several functions at once does not disturb XLA where it times GEMMs on a GPU to choose among them: it
    does so under a lock of the device. The threads see `jax.default_device` and `jax.default_matmul_precision` of the
    caller, but no other setting that a `with` block makes for a thread.

    Args:
        jobs: Called without arguments.
        finished: Called in this thread after each job.
        threads: 0: one per core, at most MOST_THREADS.

    Raises:
        Exception: the first one that a job raises, itself; the jobs that had not begun are not run, those that had
            have ended. Likewise for a KeyboardInterrupt here.
    """
    threads = threads or min(MOST_THREADS, _cores())
    device, precision = jax.config.jax_default_device, jax.config.jax_default_matmul_precision

    ended = threading.Event()

    def run(job: Callable[[], Any]) -> None:
        if ended.is_set():
            return
        try:
            with jax.default_device(device), jax.default_matmul_precision(precision):
                job()
        except BaseException:
            ended.set()
            raise

    with ThreadPoolExecutor(max(1, min(threads, len(jobs))), "compile") as pool:
        futures: list[Future[None]] = [pool.submit(run, job) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
                finished()
        finally:
            ended.set()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
