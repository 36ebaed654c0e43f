"""Annotations of shapes and types, enforced while tests run."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

PACKAGES = ("loquetier_jax.step", "loquetier_jax.adapters.pages", "loquetier_jax.adapters.merge")
"""Where arrays come and go; the public ops of the kernels are checked one by one (tests/kernels/test_signatures.py)."""

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int where a float is wanted, as type checkers have it


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`beartype`, but for constructors: jax builds the nodes of its trees out of any leaves, of shapes, of None."""
    return function if function.__name__ == "__init__" else _check(function)
