"""Which implementation of an op runs: named by the caller, or the best for the device."""

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


def interpreted(interpret: bool | None) -> bool:
    """Whether a kernel runs as plain XLA operations: by default on the CPU only."""
    return jax.default_backend() == "cpu" if interpret is None else interpret
