"""The package's exceptions: each is a LoquetierError and also the standard type a caller would expect."""

from typing import Any


def short(value: Any, limit: int = 60) -> str:
    """The repr of `value`, truncated to `limit` characters; a placeholder if repr fails (nesting, huge integers)."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= limit else text[: limit - 3] + "..."


class LoquetierError(Exception):
    """Base of every error that loquetier_jax raises deliberately; its message is always printable."""

    def __str__(self) -> str:
        return super().__str__().encode("utf-8", "backslashreplace").decode()  # escapes lone surrogates


class ConfigError(LoquetierError, ValueError):
    """A configuration key or value is invalid; the message gives the name, the value and what was expected."""


class ModelError(LoquetierError, ValueError):
    """A base model folder cannot be loaded: unsupported architecture, or a missing, unexpected or misshapen tensor."""


class AdapterError(LoquetierError, ValueError):
    """An adapter is unknown, malformed, or needs something unsupported."""


class NoModuleError(AdapterError):
    """The target_modules of a LoraConfig match no module of the base."""


class RequestError(LoquetierError, ValueError):
    """A request was refused before admission."""


class DataError(LoquetierError, ValueError):
    """Training data is malformed; the message names the file and the line."""


class JobError(LoquetierError, RuntimeError):
    """A fine-tuning job cannot do what was asked in its current state."""


class CheckpointError(LoquetierError, RuntimeError):
    """A checkpoint is missing, incomplete, damaged or belongs to another job; the message names the file."""


class EngineError(LoquetierError, RuntimeError):
    """The engine is closed, or a step failed and device state is lost; resume jobs from checkpoints in a new one."""


class CapacityError(LoquetierError, RuntimeError):
    """Not enough free pages or slots at the moment; nothing was changed."""


class IntegrityError(LoquetierError, RuntimeError):
    """Page, slot or version bookkeeping is inconsistent: a bug."""
