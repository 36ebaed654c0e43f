"""Compiled functions kept on disk, so that a second start neither traces nor lowers nor compiles."""

from loquetier_jax.executables.store import NOWHERE, Executables, Program, cache_folder, executables_in

__all__ = ["NOWHERE", "Executables", "Program", "cache_folder", "executables_in"]
