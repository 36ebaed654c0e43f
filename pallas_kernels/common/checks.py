"""Argument checks shared by the ops; wrong shapes would make kernels read or write out of bounds."""

from typing import Any


def check_shapes(**arrays: tuple[Any, tuple[int, ...]]) -> None:
    """Checks every named (array, expected shape).

    Raises:
        ValueError: a shape differs; the message gives both.
    """
    for name, (array, shape) in arrays.items():
        if tuple(array.shape) != shape:
            raise ValueError(f"{name}: got shape {tuple(array.shape)}, expected {shape}")


def check_rank(name: str, array: Any, dimensions: int) -> None:
    """Checks the number of dimensions of an array.

    Raises:
        ValueError: it differs.
    """
    if array.ndim != dimensions:
        raise ValueError(f"{name}: got shape {tuple(array.shape)}, expected {dimensions} dimensions")


def check_dtype(name: str, array: Any, like: str, dtype: Any) -> None:
    """Checks that an array has `dtype`, the dtype of the argument named `like`.

    Raises:
        TypeError: it does not; the message gives both.
    """
    if array.dtype != dtype:
        raise TypeError(f"{name}: got dtype {array.dtype}, expected {like}'s {dtype}")
