"""Checkpoints that are due, written beside the loop: it refers to a job's state, and other threads do the rest."""

import logging
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from loquetier_jax.driver import Driver
from loquetier_jax.errors import CheckpointError
from loquetier_jax.loop_thread import EngineThread
from loquetier_jax.train.checkpoint import CheckpointStore
from loquetier_jax.train.device_job import DeviceJob
from loquetier_jax.train.job_state import JobState
from loquetier_jax.train.run_folder import CHECKPOINTS

log = logging.getLogger(__name__)

FOR_EVER = (NotADirectoryError, FileExistsError)
"""A file where the folder should be: no later save could succeed."""


class CheckpointWriter:
    """Writes the checkpoints of an engine's jobs, each in a thread of its own; at most one of a job at a time.

    Until its arrays are on the host, a job's next optimizer step waits, which would overwrite them; a save that is due
    while the one before is being written waits for it, and with it the job's next pack. Nobody else waits.

    Args:
        driver: Of the loop; what becomes of a save is told in its lock.
        take: Refers to a job's state: `JobHome.take_state`.

    Attributes:
        store: Makes the CheckpointStore of (folder, keep=); another one may stand in for a disk that is slow or full.
    """

    def __init__(self, driver: Driver, take: Callable[[DeviceJob], JobState]) -> None:
        self.store: Callable[..., CheckpointStore] = CheckpointStore
        self._driver, self._take = driver, take
        self._under_way: dict[DeviceJob, threading.Event] = {}
        self._holds = 0

    @property
    def busy(self) -> bool:
        """Whether a save is under way whose end the loop has not been told, or a job rests for one."""
        with self._driver.lock:
            return bool(self._under_way or self._holds)

    def wait(self) -> bool:
        """Returns when what is under way has been written, though the loop may not know yet; whether anything was."""
        with self._driver.lock:
            saves = list(self._under_way.values())
        for written in saves:
            written.wait()
        return bool(saves)

    # For who has the lock.

    def save_if_due(self, device_job: DeviceJob) -> None:
        """Begins a job's save, if one is due and none is under way. The caller has the lock.

        A save that fails is told in a warning, and the next one that is due tries again.
        """
        job = device_job.job
        if not job.save_due or job.in_flight or device_job.saving is not None:
            return
        try:
            state = self.begin(device_job)
        except OSError as error:  # of its metrics
            _tell_failure(job.name, job.step, error)
            return
        if job.status == "paused":  # whoever takes it up goes on
            state.host["job"]["status"] = job.paused_from
        try:
            EngineThread(partial(self._run, device_job, state), "checkpoint").start()
        except RuntimeError as error:  # no room for a thread, or the process is ending
            self.end(device_job)
            _tell_failure(job.name, job.step, error)

    def hold(self, device_job: DeviceJob) -> None:
        """Lets a job rest between two packs, until `let_go` was called as often. The caller has the lock."""
        device_job.held += 1
        self._holds += 1

    def let_go(self, device_job: DeviceJob) -> None:
        """Lets a job that rests go on. The caller has the lock."""
        device_job.held -= 1
        self._holds -= 1

    def begin(self, device_job: DeviceJob) -> JobState:
        """Refers to a job's state, none of which may change before `end`, or before what says so. Has the lock.

        Raises:
            JobError: packs of it are in flight.
            OSError: the disk does not take its metrics.
        """
        state = self._take(device_job)
        device_job.saving, device_job.copying = device_job.job.step, True
        self._under_way[device_job] = threading.Event()
        return state

    def end(self, device_job: DeviceJob) -> None:
        """Says that what was begun is over, however it went. The caller has the lock."""
        device_job.saving, device_job.copying = None, False
        self._under_way.pop(device_job).set()

    # In a thread of its own.

    def _run(self, device_job: DeviceJob, state: JobState) -> None:
        step, written, found = device_job.saving, self._under_way[device_job], None
        try:
            self._write(device_job, state)
        except Exception as error:  # handed to the loop: a thread has no caller to raise to
            found = error
        self._driver.post(partial(self._written, device_job, step, found))
        written.set()

    def _write(self, device_job: DeviceJob, state: JobState) -> None:
        cfg = device_job.job.cfg
        store = self.store(Path(cfg.output_dir) / CHECKPOINTS, keep=cfg.save_total_limit)
        store.folder.mkdir(parents=True, exist_ok=True)  # first: where it cannot be, the job makes no further step
        state.fetch()
        self._driver.post(partial(setattr, device_job, "copying", False))
        device_job.job.record.sync()
        store.save(state.arrays, state.host)

    def _written(self, device_job: DeviceJob, step: int, error: Exception | None) -> None:
        """What the loop does when a save has been written, or has failed."""
        job = device_job.job
        self.end(device_job)
        with job.fail_on_error():
            if error is None:
                job.saved(step)
            elif job.status in ("failed", "cancelled") or _may_pass(error):
                _tell_failure(job.name, step, error)
            else:
                raise error
            if job.step != step:  # a step of which a save was due meanwhile
                self.save_if_due(device_job)


def _may_pass(error: Exception) -> bool:
    """Whether a later save may succeed where this one did not."""
    of_the_disk = isinstance(error, OSError | CheckpointError)
    return of_the_disk and not isinstance(error, FOR_EVER) and not isinstance(error.__cause__, FOR_EVER)


def _tell_failure(name: str, step: int, error: Exception) -> None:
    log.warning("job %s: step %d is not saved; the next save tries again: %s", name, step, error)
