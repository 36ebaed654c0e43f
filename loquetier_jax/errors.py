"""The errors this package raises: each is a LoquetierError and the standard type a caller would expect.

And how their messages show what came.
"""

from typing import Any


def short(value: Any, limit: int = 60) -> str:
    """The repr of a value in at most `limit` characters, also of one that has none: nested too deep, an endless int."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= limit else text[: limit - 3] + "..."


class LoquetierError(Exception):
    """Base of every error raised on purpose by loquetier_jax; its message can be printed, whatever it quotes."""

    def __str__(self) -> str:
        return super().__str__().encode("utf-8", "backslashreplace").decode()  # half a surrogate pair is no UTF-8


class ConfigError(LoquetierError, ValueError):
    """A configuration value or key is wrong; the message names it, what came and what was expected."""


class ModelError(LoquetierError, ValueError):
    """A base model folder cannot be loaded: unsupported architecture, or a missing, extra or mis-shaped tensor."""


class AdapterError(LoquetierError, ValueError):
    """An adapter is unknown, malformed, or asks for something that cannot be honoured."""


class NoModuleError(AdapterError):
    """The names of a LoraConfig match no module of the base."""


class RequestError(LoquetierError, ValueError):
    """A request is refused before admission."""


class DataError(LoquetierError, ValueError):
    """Training data is malformed; the message names the file and the line."""


class JobError(LoquetierError, RuntimeError):
    """A fine-tuning job cannot do what was asked in its present state."""


class CheckpointError(LoquetierError, RuntimeError):
    """A checkpoint is absent, incomplete, damaged or belongs to something else; names the file."""


class EngineError(LoquetierError, RuntimeError):
    """A step has failed, so that nothing on the device can be trusted; a new engine resumes jobs from checkpoints."""


class CapacityError(LoquetierError, RuntimeError):
    """No room now (pages, slots); nothing was changed."""


class IntegrityError(LoquetierError, RuntimeError):
    """Pages or slots do not add up: a bug, found by check_integrity()."""
