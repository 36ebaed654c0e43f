"""What the job manager and the job handles of one engine share."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from loquetier_jax.adapters.store import AdapterStore
from loquetier_jax.driver import Driver
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.step.state import DeviceState
from loquetier_jax.train.data import Dataset
from loquetier_jax.train.data_identity import data_identity
from loquetier_jax.train.device_job import DeviceJob
from loquetier_jax.train.fingerprint import base_fingerprint
from loquetier_jax.train.job_state import JobState, take_job_state
from loquetier_jax.train.runner import JobRunner
from loquetier_jax.train.saver import CheckpointWriter


@dataclass
class JobHome:
    """The parts of an engine that jobs touch.

    Attributes:
        spec, state: The base, and the engine's arrays.
        store: Its adapters.
        driver: The loop's driver.
        runner: Runs the jobs.
        epoch: Returns the epoch of the last dispatched step.
        base: The base model named in exported adapters.
        jobs: Handles by name; those of ended jobs too, until they are forgotten or their name is reused.
        hash_base: Hashes the base.
        saver: Writes the jobs' checkpoints.
    """

    spec: DecoderSpec
    state: DeviceState
    store: AdapterStore
    driver: Driver
    runner: JobRunner
    epoch: Callable[[], int]
    base: str = ""
    jobs: dict[str, Any] = field(default_factory=dict)
    hash_base: Callable[[DecoderSpec, Any], str] = base_fingerprint
    saver: CheckpointWriter = field(init=False)

    def __post_init__(self) -> None:
        self.saver = CheckpointWriter(self.driver, lambda device_job: self.take_state(device_job))
        self._fingerprint: str | None = None
        self._hashing = threading.Lock()

    def fingerprint(self) -> str:
        """The base's fingerprint, computed once; slow the first time, so call it first without the loop's lock."""
        with self._hashing:
            if self._fingerprint is None:
                self._fingerprint = self.hash_base(self.spec, self.state.params)
            return self._fingerprint

    def hash_for_saving(self, *data: Dataset | None) -> None:
        """Hashes the base and a job's data, once, in the caller's thread; call it without the loop's lock.

        Raises:
            EngineError: the engine was closed.
        """
        self.driver.check_open()
        self.fingerprint()
        for one in data:
            data_identity(one)

    def take_state(self, device_job: DeviceJob) -> JobState:
        """References a job's state; the caller holds the lock, and no work of the job is in flight."""
        return take_job_state(self.state, self.fingerprint(), device_job)
