"""The signature of custom losses."""

import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from loquetier_jax.errors import ConfigError


def takes_batch(loss: Callable[..., Any]) -> bool:
    """Whether a loss takes a LossBatch in addition to log-probs and weights.

    It does if it requires three arguments, or if its third parameter is named `batch`, even if it has a default.

    Raises:
        ConfigError: it can be called with neither two nor three arguments.
    """
    for count in (2, 3):
        with suppress(TypeError, ValueError):  # ValueError: a builtin without a signature
            signature = inspect.signature(loss)
            signature.bind(*range(count))
            return count == 3 or _names_batch(signature)
    raise ConfigError(f"loss: got {loss!r:.200}, expected a function of (logp, weights) or (logp, weights, batch)")


def _names_batch(signature: inspect.Signature) -> bool:
    third = list(signature.parameters.values())[2:3]
    return any(p.name == "batch" and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in third)
