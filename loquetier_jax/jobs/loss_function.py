"""How a loss of one's own wants to be called."""

import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from loquetier_jax.errors import ConfigError


def takes_batch(loss: Callable[..., Any]) -> bool:
    """Whether a loss takes a LossBatch beside log-probs and weights: whether it cannot do with two arguments.

    Raises:
        ConfigError: it takes neither two nor three.
    """
    for count in (2, 3):
        with suppress(TypeError, ValueError):  # ValueError: a builtin that tells no signature
            inspect.signature(loss).bind(*range(count))
            return count == 3
    raise ConfigError(f"loss: got {loss!r:.200}, expected a function of (logp, weights) or (logp, weights, batch)")
