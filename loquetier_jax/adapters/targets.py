"""Names of the adaptable projections, ours and HF's, and PEFT's rules for matching them."""

import re
from typing import Any

from loquetier_jax.adapters.pattern import Steps, fullmatch
from loquetier_jax.models.spec import MODULES

TARGETS: tuple[str, ...] = tuple(MODULES)

# Name components that torch.compile, DDP, FSDP and activation checkpointing add to modules they wrap.
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PLAIN = re.compile(r"[\w.]+")


def unwrapped(name: str) -> str:
    """A module or tensor name without the components added by training wrappers."""
    return _WRAPPERS.sub("", name)


def weight_key(layer: int, target: str) -> str:
    """The key of one module in `LoraWeights`, e.g. "layers.0.q_proj"."""
    return f"layers.{layer}.{target}"


def module_name(layer: int, target: str) -> str:
    """The module's full name in the HF model, e.g. "model.layers.0.self_attn.q_proj"."""
    return f"model.layers.{layer}.{MODULES[target]}"


def is_targeted(
    name: str,
    targets: tuple[str, ...] | str,
    excluded: tuple[str, ...] | str | None,
    layers: tuple[int, ...] | None,
    steps: Steps,
) -> bool:
    """Whether a module gets an adapter (PEFT, tuners_utils.check_target_module_exists).

    Args:
        name: Its full name.
        targets, excluded, layers: `target_modules`, `exclude_modules` and `layers_to_transform` of a LoraConfig.
        steps: The budget for matching.

    Raises:
        TimeoutError: the budget is exhausted.
    """
    if excluded and matches(excluded, name, steps):
        return False
    if targets == "all-linear":
        return True
    if not matches(targets, name, steps):
        return False
    # `layers` restricts suffixes but not full names.
    if not layers or isinstance(targets, str) or name in targets:
        return True
    index = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return index is not None and int(index[1]) in layers


def matches(names: tuple[str, ...] | str, name: str, steps: Steps) -> bool:
    """PEFT's rule: a string is a regular expression for the whole of `name`, a list holds names or suffixes.

    Raises:
        TimeoutError: the budget is exhausted.
    """
    if isinstance(names, str):
        return fullmatch(names, name, steps)
    steps.take(len(names))
    return any(name == entry or name.endswith(f".{entry}") for entry in names)


def first_match(pattern: dict[str, Any], name: str, default: Any, steps: Steps) -> Any:
    """The value of the first key that matches (PEFT, utils.other.get_pattern_key), or `default`.

    Raises:
        TimeoutError: the budget is exhausted.
    """
    return next((value for key, value in pattern.items() if pattern_matches(key, name, steps)), default)


def pattern_matches(key: str, name: str, steps: Steps) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern` matches the module `name`, as (.*\\.)?(key)$ does.

    Raises:
        TimeoutError: the budget is exhausted.
    """
    if _PLAIN.fullmatch(key):  # fast path: PEFT writes one such key per module, possibly hundreds
        steps.take()
        head, tail = name[: -len(key)], name[-len(key) :]
        whole = len(key) <= len(name) and (not head or head.endswith("."))
        return whole and (key == tail or all(k in (".", c) for k, c in zip(key, tail, strict=True)))
    starts = 1 | sum(1 << i + 1 for i, char in enumerate(name) if char == ".")
    return fullmatch(key, name, steps, starts)
