"""What ops refuse before they compute: shapes beside which a kernel would read or write."""

from typing import Any


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


def check_dtype(name: str, array: Any, like: str, dtype: Any) -> None:
    """The array has the dtype of the one that is called `like`.

    Raises:
        TypeError: it has not; both are named.
    """
    if array.dtype != dtype:
        raise TypeError(f"{name}: got dtype {array.dtype}, expected {like}'s {dtype}")
