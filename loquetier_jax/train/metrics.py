"""metrics.jsonl: one line of plain numbers per event, append only, cut back to a known length on resume."""

import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from loquetier_jax.errors import CheckpointError
from loquetier_jax.train.run_folder import RunLock

log = logging.getLogger(__name__)


class MetricsWriter:
    """Appends JSON lines to a file; each line is in the file (not only in a buffer) when `write` has not warned.

    The file is open only during a call: a job that is dropped leaves nothing open. Its folder is locked
    (`run_folder.RunLock`) until `close`.

    Args:
        path: The file; it and its folder are made when missing, what it holds is kept.

    Raises:
        JobError: another process writes to that folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = RunLock(self.path.parent)
        self._waiting: list[bytes] = []
        self.path.touch()

    def write(self, line: dict[str, Any]) -> None:
        """Appends one line. Where the disk does not take it, it waits for the next one, with a warning.

        Raises:
            ValueError: a number that JSON does not have (NaN, infinity); nothing is written.
            FileNotFoundError: the folder is gone.
        """
        self._waiting.append(json.dumps(line, allow_nan=False).encode() + b"\n")
        try:
            self.flush()
        except FileNotFoundError:
            raise
        except OSError as error:
            log.warning("%s: %d lines cannot be written yet: %s", self.path, len(self._waiting), error)

    def flush(self) -> None:
        """Appends the lines that wait, all or none; raises OSError where the disk does not take them."""
        if not self._waiting:
            return
        with self.path.open("ab") as file:
            size = file.tell()
        try:
            with self.path.open("ab") as file:
                file.write(b"".join(self._waiting))
        except OSError:
            with suppress(OSError):
                os.truncate(self.path, size)
            raise
        self._waiting.clear()

    def close(self) -> None:
        """Gives the folder back to other processes; nothing more is written."""
        with suppress(OSError):
            self.flush()
        self._lock.release()

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
        """Forces what is in the file to the disk, so that a checkpoint never remembers more than a crash leaves.

        It may take long; another thread may write lines meanwhile. Raises OSError where the disk does not take them.
        """
        with self.path.open("ab") as file:
            os.fsync(file.fileno())


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All lines of a metrics file; a last line that a kill cut short is left out."""
    lines = Path(path).read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]
