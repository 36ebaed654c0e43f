"""What of a job's config may change when it is resumed."""

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
"""What a job may be given anew when it is resumed: whatever its past steps and their data do not depend on."""


def changed_config(saved: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A saved config with other values from here on.

    Args:
        saved: From `TrainConfig.to_dict`.
        changes: Fields of CHANGEABLE.

    Raises:
        ConfigError: a field that the past of the job depends on, or none.
    """
    require(isinstance(changes, Mapping), "train", changes, "a mapping of TrainConfig fields to change")
    for key, value in changes.items():
        require(key in CHANGEABLE, f"train {key}", value, f"one of {CHANGEABLE}: the others cannot change on resume")
    return saved | dict(changes)
