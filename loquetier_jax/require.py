"""Checks of configuration values. Imports no jax."""

from typing import Any

from loquetier_jax.errors import ConfigError, short


def is_int(value: Any) -> bool:
    """Whether `value` is an int but not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether `value` is an int or a float but not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def require(ok: Any, name: str, got: Any, expected: str) -> None:
    """Raises ConfigError unless `ok`; the message names the argument, the value and what was expected."""
    if not ok:
        raise ConfigError(f"{name}: got {short(got, 500)}, expected {expected}")
