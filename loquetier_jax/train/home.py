"""Where the jobs of one engine live: what the manager and the handles of jobs share."""

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
        driver: Of its loop.
        runner: Where jobs run.
        epoch: Gives the last step dispatched.
        base: What exported adapters name as their base model.
        jobs: Handles by name, of ended jobs too until they are forgotten or their name is used again.
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
        """Of the base, which is read once; takes long the first time, so call it without the loop's lock first."""
        with self._hashing:
            if self._fingerprint is None:
                self._fingerprint = self.hash_base(self.spec, self.state.params)
            return self._fingerprint

    def hash_for_saving(self, *data: Dataset | None) -> None:
        """Hashes what a job's state names, the base and its data: once, in the caller's thread, without the lock.

        Raises:
            EngineError: the engine was closed.
        """
        self.driver.check_open()
        self.fingerprint()
        for one in data:
            data_identity(one)

    def take_state(self, device_job: DeviceJob) -> JobState:
        """Refers to a job's state; the caller has the lock, and nothing of the job is in flight."""
        return take_job_state(self.state, self.fingerprint(), device_job)
