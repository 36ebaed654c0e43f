"""What ops refuse before they compute: shapes beside which a kernel would read or write, implementations not there."""

from typing import Any

import jax

IMPLEMENTATIONS = ("xla", "triton")


def choose(implementation: str | None) -> str:
    """The implementation of an op: None is triton on a GPU and xla elsewhere.

    Raises:
        ValueError: the implementation is unknown.
    """
    if implementation is None:
        return "triton" if jax.default_backend() == "gpu" else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: got {implementation!r}, expected one of {IMPLEMENTATIONS} or None")
    return implementation


def check_count(name: str, value: int, rows: int) -> None:
    """The number of leading rows is one that x has.

    Raises:
        ValueError: it is not.
    """
    if not 0 <= value <= rows:
        raise ValueError(f"{name}: got {value}, expected 0 to x's {rows} rows")


def check_shapes(**arrays: tuple[Any, tuple[int, ...]]) -> None:
    """Every named (array, expected shape) agrees.

    Raises:
        ValueError: one does not; both shapes are named.
    """
    for name, (array, shape) in arrays.items():
        if tuple(array.shape) != shape:
            raise ValueError(f"{name}: got shape {tuple(array.shape)}, expected {shape}")


def check_rank(name: str, array: Any, dimensions: int) -> None:
    """The array has that many dimensions.

    Raises:
        ValueError: it has not.
    """
    if array.ndim != dimensions:
        raise ValueError(f"{name}: got shape {tuple(array.shape)}, expected {dimensions} dimensions")
