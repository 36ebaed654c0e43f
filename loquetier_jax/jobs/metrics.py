"""metrics.jsonl: one line of plain numbers per event, append only, cut back to a known length on resume."""

import json
import os
from pathlib import Path
from typing import Any

from loquetier_jax.errors import CheckpointError


class MetricsWriter:
    """Appends JSON lines to a file; each line is in the file (not only in a buffer) when `write` returns.

    The file is open only during a call: a job that is dropped leaves nothing open.

    Args:
        path: The file; it and its folder are made when missing, what it holds is kept.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()

    def write(self, line: dict[str, Any]) -> None:
        """Appends one line.

        Raises:
            ValueError: a number that JSON does not have (NaN, infinity); nothing is written.
        """
        data = json.dumps(line, allow_nan=False).encode() + b"\n"
        with self.path.open("ab") as file:
            file.write(data)

    def position(self) -> int:
        """Length of the file in bytes: what a checkpoint remembers."""
        return self.path.stat().st_size

    def truncate(self, position: int) -> None:
        """Drops what was written after `position`: lines of steps that a resumed job runs again.

        Raises:
            CheckpointError: the file is shorter than that, so it is not the file the checkpoint knew.
        """
        if not 0 <= position <= self.position():
            raise CheckpointError(
                f"{self.path}: got {self.position()} bytes, expected {position} or more: not the job's file"
            )
        os.truncate(self.path, position)

    def sync(self) -> None:
        """Forces the file to the disk, so that a checkpoint never remembers more than a crash leaves."""
        with self.path.open("ab") as file:
            os.fsync(file.fileno())


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All lines of a metrics file; a last line that a kill cut short is left out."""
    lines = Path(path).read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]
