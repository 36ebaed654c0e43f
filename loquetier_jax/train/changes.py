"""The settings of a job that may change on resume."""

from collections.abc import Mapping
from typing import Any

from loquetier_jax.config import require

CHANGEABLE = (
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "max_grad_norm",
    "weight_decay",
    "eval_steps",
    "early_stopping_patience",
    "early_stopping_threshold",
    "load_best_model_at_end",
    "logging_steps",
    "save_steps",
    "save_total_limit",
)
"""Fields of TrainConfig that may change on resume: those on which past steps and their data do not depend."""


def changed_config(saved: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A saved config with some fields changed.

    Args:
        saved: From `TrainConfig.to_dict`.
        changes: Fields of CHANGEABLE.

    Raises:
        ConfigError: an unknown field, or one that may not change.
    """
    require(isinstance(changes, Mapping), "train", changes, "a mapping of TrainConfig fields to change")
    for key, value in changes.items():
        require(key in CHANGEABLE, f"train {key}", value, f"one of {CHANGEABLE}: the others cannot change on resume")
    return saved | dict(changes)
