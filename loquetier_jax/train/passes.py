"""What has been dispatched for jobs and comes back to them: passes and optimizer steps."""

from dataclasses import dataclass

import jax

from loquetier_jax.batch.packs import Pack
from loquetier_jax.train.device_job import DeviceJob
from loquetier_jax.train.micro_step import MicroStep


@dataclass
class RunningPass:
    """A MicroStep and whose packs it carries."""

    run: MicroStep
    owners: list[DeviceJob]
    packs: list[Pack]


@dataclass
class OptimizerResult:
    """An optimizer step that has been dispatched."""

    device_job: DeviceJob
    metrics: dict[str, jax.Array]
    learning_rate: float
