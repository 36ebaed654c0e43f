"""metrics.jsonl: one JSON line per event, append-only, truncated to the checkpoint's position on resume."""

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
    """Appends JSON lines to a file. After `write`, the line is in the file unless it logged a warning.

    The file is open only during a call, so a dropped job leaves nothing open. Its folder is locked
    (`run_folder.RunLock`) until `close`.

    Args:
        path: The file; it and its folder are created if missing, and existing lines are kept.

    Raises:
        JobError: another process writes to that folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = RunLock(self.path.parent)
        self._waiting: list[bytes] = []
        self.path.touch()

    def write(self, line: dict[str, Any]) -> None:
        """Appends one line. If it cannot be written, logs a warning and retries with the next one.

        Raises:
            ValueError: a number that JSON cannot represent (NaN, infinity); nothing is written.
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
        """Appends all pending lines; raises OSError, with none of them in the file, if that fails."""
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
        """Unlocks the folder for other processes; nothing may be written afterwards."""
        with suppress(OSError):
            self.flush()
        self._lock.release()

    def position(self) -> int:
        """Length of the file in bytes, as stored in checkpoints."""
        return self.path.stat().st_size

    def truncate(self, position: int) -> None:
        """Drops what was written after `position`: lines of steps that a resumed job repeats.

        Raises:
            CheckpointError: the file is shorter than that, so it is not the job's file.
        """
        if not 0 <= position <= self.position():
            raise CheckpointError(
                f"{self.path}: got {self.position()} bytes, expected {position} or more: not the job's file"
            )
        os.truncate(self.path, position)

    def sync(self) -> None:
        """Flushes the file to disk (fsync), so that a checkpoint's position is never beyond what survives a crash.

        May take long; other threads may write lines meanwhile. Raises OSError if it fails.
        """
        with self.path.open("ab") as file:
            os.fsync(file.fileno())


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All lines of a metrics file; an incomplete last line, as left by a kill, is skipped."""
    lines = Path(path).read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]
