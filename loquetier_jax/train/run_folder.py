"""The folder of a run, {metrics.jsonl, checkpoints/}, in which one process writes at a time.

The kernel holds the lock for the process, so it ends with the process, whatever ends that.
"""

import errno
import fcntl
import logging
import os
import threading
import weakref
from pathlib import Path

from loquetier_jax.errors import JobError

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
LOCK = ".lock"
TAKEN = (errno.EAGAIN, errno.EACCES)


class RunLock:
    """Holds a folder, which is made when missing, until `release`, the end of a `with` block, or its own end.

    Other processes are refused; in this one several may hold it, e.g. a command and the job that it runs.

    Raises:
        JobError: another process holds it; names the folder.
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        where = Path(folder).resolve()
        with _guard:
            self._file = _held.get(where) or LockedFile(where / LOCK, str(folder))
            _held[where] = self._file

    def release(self) -> None:
        """Lets go of it; again does nothing."""
        self._file = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class LockedFile:
    """A file with a lock on it, for as long as this object lives.

    Args:
        file: Made when missing; it says which process has it.
        name: The folder, as it was given.
    """

    def __init__(self, file: Path, name: str) -> None:
        self._handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.truncate(self._handle, 0)
            os.pwrite(self._handle, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            if error.errno in TAKEN:
                holder = os.pread(self._handle, 20, 0).decode(errors="replace").strip() or "unknown"
                raise JobError(
                    f"output_dir: got {name!r}, where another process ({holder}) writes its run; "
                    "expected another folder, or that process to end first"
                ) from error
            log.warning("%s: cannot be locked (%s): see to it that no other process writes there", name, error)

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)


_guard = threading.Lock()
_held: weakref.WeakValueDictionary[Path, LockedFile] = weakref.WeakValueDictionary()
