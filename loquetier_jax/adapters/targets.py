"""Names of the adaptable projections: ours, HF's, and PEFT's rules for matching one against the other."""

import re
from typing import Any

from loquetier_jax.models.spec import MODULES

TARGETS: tuple[str, ...] = tuple(MODULES)


def weight_key(layer: int, target: str) -> str:
    """The key of one module in `LoraWeights`, e.g. "layers.0.q_proj"."""
    return f"layers.{layer}.{target}"


def module_name(layer: int, target: str) -> str:
    """The module's full name in the HF model, e.g. "model.layers.0.self_attn.q_proj"."""
    return f"model.layers.{layer}.{MODULES[target]}"


def matches(names: tuple[str, ...] | str, name: str) -> bool:
    """PEFT's rule: a string is a regular expression for all of `name`, a list holds names or suffixes."""
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in names)


def first_match(pattern: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first key that matches (PEFT, utils.other.get_pattern_key), or `default`."""
    return next((value for key, value in pattern.items() if pattern_matches(key, name)), default)


def pattern_matches(key: str, name: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern` stands for the module `name`."""
    return re.match(rf"(.*\.)?({key})$", name) is not None
