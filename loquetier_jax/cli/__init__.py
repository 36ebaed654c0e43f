"""The command line, `loquetier`: one file per command, each with `add_parser` and `run`."""

from loquetier_jax.cli.main import main

__all__ = ["main"]
