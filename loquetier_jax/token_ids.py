"""Token ids as they come: lists, tuples, arrays and tensors of whatever library, with its numbers inside. No jax."""

from collections.abc import Mapping, Sequence
from typing import Any


def listed(value: Any) -> Any:
    """An array or tensor as the list of Python numbers it holds, also one number by one; anything else as it is.

    What the numbers are is not looked at: floats stay floats, for the caller to refuse.
    """
    if hasattr(value, "tolist") and hasattr(value, "shape"):
        return value.tolist()
    if isinstance(value, (list, tuple)) and any(hasattr(one, "tolist") for one in value):
        return [one.tolist() if hasattr(one, "tolist") else one for one in value]
    return value


def plain_prompt(prompt: Any) -> Any:
    """A prompt in the form that `encode_prompt` knows.

    Arrays of token ids become lists, and vLLM's {"prompt": text} and {"prompt_token_ids": ids} what they hold. Anything
    else stays as it is, for the caller to refuse.
    """
    if isinstance(prompt, Mapping) and len(prompt) == 1:
        ((key, value),) = prompt.items()
        if key == "prompt_token_ids" or (key == "prompt" and isinstance(value, str)):
            prompt = value
    return listed(prompt)


def are_token_ids(value: Any) -> bool:
    """Whether `value` is a sequence of integers; True is none, and bytes are no token ids."""
    listing = isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))
    return listing and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
