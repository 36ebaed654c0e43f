"""A folder of files that only this user can have written; many processes may share it."""

import contextlib
import logging
import os
import stat
import tempfile
import time
from pathlib import Path

log = logging.getLogger(__name__)

PART = ".part"  # ends the name of a file under way
ABANDONED_S = 3600.0  # age after which nobody completes it


class PrivateFolder:
    """Reads and writes small files that are trusted, because nobody but this user could have put them there.

    A file appears under its name only when it is complete, so readers and writers of other processes never meet;
    of two that write the same name, the last one wins.
    """

    def __init__(self, path: Path) -> None:
        """Creates the folder, mode 0700, unless it exists.

        Raises:
            OSError: it cannot be created.
            PermissionError: it exists, and belongs to another user or may be written by one.
        """
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_others(path, os.lstat(path), stat.S_ISDIR)
        self.path = path

    def read(self, name: str) -> bytes | None:
        """A file's bytes, and marks it as used now; None if there is none.

        Raises:
            OSError: it cannot be read.
            PermissionError: it belongs to another user, or may be written by one.
        """
        path = self.path / name
        try:
            with open(path, "rb") as file:
                _refuse_others(path, os.fstat(file.fileno()), stat.S_ISREG)
                content = file.read()
        except FileNotFoundError:
            return None
        with contextlib.suppress(OSError):  # it is gone, or the file system is read-only: then it is not used longer
            os.utime(path)
        return content

    def write(self, name: str, content: bytes) -> None:
        """Writes a file as a whole, or not at all.

        Raises:
            OSError: e.g. the disk is full.
        """
        handle, part = tempfile.mkstemp(suffix=PART, dir=self.path)  # mode 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(part, self.path / name)
        except BaseException:
            os.unlink(part)
            raise

    def drop(self, name: str) -> None:
        """Removes a file, if there is one."""
        with contextlib.suppress(OSError):  # another process was faster
            os.unlink(self.path / name)

    def trim(self, max_bytes: int, max_age_s: float) -> None:
        """Removes what was not used for `max_age_s`, and then the least recently used beyond `max_bytes`."""
        now, files = time.time(), []
        for entry in os.scandir(self.path):
            with contextlib.suppress(OSError):  # another process trims, too
                info = entry.stat(follow_symlinks=False)
                files.append((info.st_mtime, info.st_size, entry.name))
        total = 0
        for used, size, name in sorted(files, reverse=True):
            total += size
            age = ABANDONED_S if name.endswith(PART) else max_age_s
            if total > max_bytes or now - used > age:
                self.drop(name)


def _refuse_others(path: Path, info: os.stat_result, kind: object) -> None:
    if not kind(info.st_mode):
        raise PermissionError(f"{path}: not what it should be, mode {stat.filemode(info.st_mode)}")
    if info.st_uid != os.geteuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.filemode(info.st_mode)
        raise PermissionError(f"{path}: owner {info.st_uid}, mode {mode}; expected only this user to be able to write")
