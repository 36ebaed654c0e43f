"""Normalises token ids given as lists, tuples, arrays or tensors of any library. No jax."""

from collections.abc import Mapping, Sequence
from typing import Any


def listed(value: Any) -> Any:
    """Converts an array or tensor, or a list of scalar ones, to Python numbers; returns anything else unchanged.

    Values are not checked: floats stay floats, for the caller to refuse.
    """
    if hasattr(value, "tolist") and hasattr(value, "shape"):
        return value.tolist()
    if isinstance(value, (list, tuple)) and any(hasattr(one, "tolist") for one in value):
        return [one.tolist() if hasattr(one, "tolist") else one for one in value]
    return value


def plain_prompt(prompt: Any) -> Any:
    """Converts a prompt to a form that `encode_prompt` accepts.

    Arrays of token ids become lists; vLLM's {"prompt": text} and {"prompt_token_ids": ids} are unwrapped. Anything else
    is returned unchanged, for the caller to refuse.
    """
    if isinstance(prompt, Mapping) and len(prompt) == 1:
        ((key, value),) = prompt.items()
        if key == "prompt_token_ids" or (key == "prompt" and isinstance(value, str)):
            prompt = value
    return listed(prompt)


def are_token_ids(value: Any) -> bool:
    """Whether `value` is a sequence of ints; bools and bytes do not count."""
    listing = isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))
    return listing and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
