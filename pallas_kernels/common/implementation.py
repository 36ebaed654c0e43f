"""Chooses the implementation of an op: the one named by the caller, or the best for the device."""

import jax

IMPLEMENTATIONS = ("xla", "triton")


def choose(implementation: str | None) -> str:
    """The implementation to use: None means triton on a GPU and xla elsewhere.

    Raises:
        ValueError: the implementation is unknown.
    """
    if implementation is None:
        return "triton" if jax.default_backend() == "gpu" else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: got {implementation!r}, expected one of {IMPLEMENTATIONS} or None")
    return implementation


def interpreted(interpret: bool | None) -> bool:
    """Whether kernels run in interpret mode, as plain XLA operations; by default only on CPU."""
    return jax.default_backend() == "cpu" if interpret is None else interpret
