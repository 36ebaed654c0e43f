"""Where the jobs of one engine live: what the manager and the handles of jobs share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from loquetier_jax.adapters.store import AdapterStore
from loquetier_jax.driver import Driver
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.step.state import DeviceState
from loquetier_jax.train.device_job import DeviceJob
from loquetier_jax.train.fingerprint import base_fingerprint
from loquetier_jax.train.job_state import JobState, take_job_state
from loquetier_jax.train.runner import JobRunner


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
    """

    spec: DecoderSpec
    state: DeviceState
    store: AdapterStore
    driver: Driver
    runner: JobRunner
    epoch: Callable[[], int]
    base: str = ""
    jobs: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """Of the base, which is read once."""
        return base_fingerprint(self.spec, self.state.params)

    def take_state(self, device_job: DeviceJob) -> JobState:
        """Copies a job's state to the host; the caller has the lock, and nothing of the job is in flight."""
        return take_job_state(self.spec, self.state, self.fingerprint, device_job)
