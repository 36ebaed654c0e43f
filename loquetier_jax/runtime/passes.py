"""What has been dispatched for jobs and comes back to them: passes and optimizer steps."""

from dataclasses import dataclass

import jax

from loquetier_jax.jobs.data import Pack
from loquetier_jax.runtime.trainee import Trainee
from loquetier_jax.step.train_pass import TrainPass


@dataclass
class RunningPass:
    """A TrainPass and whose packs it carries."""

    run: TrainPass
    owners: list[Trainee]
    packs: list[Pack]


@dataclass
class OptimizerResult:
    """An optimizer step that has been dispatched."""

    trainee: Trainee
    metrics: dict[str, jax.Array]
    learning_rate: float
