"""Saves checkpoints in the background: the loop references a job's state, and threads copy and write it."""

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

PERMANENT = (NotADirectoryError, FileExistsError)
"""A file is in the folder's place, so no later save can succeed."""


class CheckpointWriter:
    """Writes the checkpoints of an engine's jobs, each in its own thread; at most one per job at a time.

    A job's next optimizer step, which would overwrite its arrays, waits until they have been copied to the host. A save
    that is due while the previous one is being written waits for it, and so does the job's next pack. Requests and
    other jobs never wait.

    Args:
        driver: The loop's driver; the outcome of a save is handled under its lock.
        take: References a job's state: `JobHome.take_state`.

    Attributes:
        store: Creates a CheckpointStore from (folder, keep=); tests replace it to simulate a slow or full disk.
    """

    def __init__(self, driver: Driver, take: Callable[[DeviceJob], JobState]) -> None:
        self.store: Callable[..., CheckpointStore] = CheckpointStore
        self._driver, self._take = driver, take
        self._under_way: dict[DeviceJob, threading.Event] = {}
        self._holds = 0

    @property
    def busy(self) -> bool:
        """Whether the loop has yet to handle the end of a save, or a job is held."""
        with self._driver.lock:
            return bool(self._under_way or self._holds)

    def wait(self) -> bool:
        """Waits until the saves under way are written (the loop may not have handled them); False if there are none."""
        with self._driver.lock:
            saves = list(self._under_way.values())
        for written in saves:
            written.wait()
        return bool(saves)

    # The caller must hold the lock.

    def save_if_due(self, device_job: DeviceJob) -> None:
        """Begins a job's save if one is due and none is under way.

        A failed save logs a warning; the next due save tries again.
        """
        job = device_job.job
        if not job.save_due or job.in_flight or device_job.saving is not None:
            return
        try:
            state = self.begin(device_job)
        except OSError as error:  # from its metrics
            _tell_failure(job.name, job.step, error)
            return
        if job.status == "paused":  # a resumed job runs
            state.host["job"]["status"] = job.paused_from
        try:
            EngineThread(partial(self._run, device_job, state), "checkpoint").start()
        except RuntimeError as error:  # no room for a thread, or the process is ending
            self.end(device_job)
            _tell_failure(job.name, job.step, error)

    def hold(self, device_job: DeviceJob) -> None:
        """Stops a job between two packs until each `hold` has been matched by a `let_go`."""
        device_job.held += 1
        self._holds += 1

    def let_go(self, device_job: DeviceJob) -> None:
        """Undoes one `hold`."""
        device_job.held -= 1
        self._holds -= 1

    def begin(self, device_job: DeviceJob) -> JobState:
        """References a job's state, and blocks optimizer steps until `end` or until `copying` is cleared.

        Raises:
            JobError: packs of the job are in flight.
            OSError: its metrics cannot be written.
        """
        state = self._take(device_job)
        device_job.saving, device_job.copying = device_job.job.step, True
        self._under_way[device_job] = threading.Event()
        return state

    def end(self, device_job: DeviceJob) -> None:
        """Ends what `begin` began, whether or not it succeeded."""
        device_job.saving, device_job.copying = None, False
        self._under_way.pop(device_job).set()

    # In the save's thread.

    def _run(self, device_job: DeviceJob, state: JobState) -> None:
        step, written, found = device_job.saving, self._under_way[device_job], None
        try:
            self._write(device_job, state)
        except Exception as error:  # raised in the loop by `_written`
            found = error
        self._driver.post(partial(self._written, device_job, step, found))
        written.set()

    def _write(self, device_job: DeviceJob, state: JobState) -> None:
        cfg = device_job.job.cfg
        store = self.store(Path(cfg.output_dir) / CHECKPOINTS, keep=cfg.save_total_limit)
        store.folder.mkdir(parents=True, exist_ok=True)  # first: if it fails, no further step runs
        state.fetch()
        self._driver.post(partial(setattr, device_job, "copying", False))
        device_job.job.record.sync()
        store.save(state.arrays, state.host)

    def _written(self, device_job: DeviceJob, step: int, error: Exception | None) -> None:
        """Handles the outcome of a save, in the loop."""
        job = device_job.job
        self.end(device_job)
        with job.fail_on_error():
            if error is None:
                job.saved(step)
            elif job.status in ("failed", "cancelled") or _may_pass(error):
                _tell_failure(job.name, step, error)
            else:
                raise error
            if job.step != step:  # a save of a later step may have become due meanwhile
                self.save_if_due(device_job)


def _may_pass(error: Exception) -> bool:
    """Whether a later save may succeed after this error."""
    of_the_disk = isinstance(error, OSError | CheckpointError)
    return of_the_disk and not isinstance(error, PERMANENT) and not isinstance(error.__cause__, PERMANENT)


def _tell_failure(name: str, step: int, error: Exception) -> None:
    log.warning("job %s: step %d is not saved; the next save tries again: %s", name, step, error)
