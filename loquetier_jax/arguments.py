"""Arguments that are paths, validated up front by name."""

import os
from pathlib import Path
from typing import Any

from loquetier_jax.errors import LoquetierError, short


def path_of(value: Any, name: str, expected: str, error: type[LoquetierError]) -> Path:
    """`value`, a string or an os.PathLike, as a Path; raises `error`, naming the argument, for anything else."""
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(path, str) or not path:
        raise error(f"{name}: got {short(value, 200)}, expected the path of {expected}")
    return Path(path)
