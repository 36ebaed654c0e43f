"""The folder of a run, {metrics.jsonl, checkpoints/}, to which only one process may write at a time.

The lock is the kernel's, so it is released when the process ends for any reason.
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
    """Locks a folder, creating it if missing, until `release`, the end of a `with` block, or garbage collection.

    Excludes other processes; within this process several may hold it, e.g. a command and the job that it runs.

    Raises:
        JobError: another process holds the lock; names the folder.
        OSError: the folder is not writable.
    """

    def __init__(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        where = Path(folder).resolve()
        with _guard:
            self._file = _held.get(where) or LockedFile(where / LOCK, str(folder))
            _held[where] = self._file

    def release(self) -> None:
        """Releases the lock; calling it twice is harmless."""
        self._file = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class LockedFile:
    """A locked file; the lock lasts as long as this object.

    Args:
        file: Created if missing; contains the id of the process that holds it.
        name: The folder, as given by the user.
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
                    f"output_dir: {name!r} is in use by another process ({holder}); "
                    "use another folder, or wait until that process has ended"
                ) from error
            log.warning("%s: cannot be locked (%s); make sure that no other process writes there", name, error)

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)


_guard = threading.Lock()
_held: weakref.WeakValueDictionary[Path, LockedFile] = weakref.WeakValueDictionary()
