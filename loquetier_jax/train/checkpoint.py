"""Crash-safe checkpoints on disk: written to a temporary folder, renamed, then marked as committed.

    folder/checkpoint-00000007/{arrays/ (orbax), state.json, COMMITTED}

COMMITTED lists every file with its sha256, so that corrupted files are detected and never loaded. Readers ignore a
folder without it, and the next save removes it. Only one process may write to a folder at a time.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from loquetier_jax.config import require
from loquetier_jax.errors import CheckpointError, short

log = logging.getLogger(__name__)

FORMAT = 2
MARKER = "COMMITTED"
PREFIX = "checkpoint-"
ASIDE = ".writing-"
CLEARS = 10  # attempts; after a failed save, orbax's threads may still be creating files
FAULT_POINTS = (
    *("before_rename", "after_rename", "before_commit", "after_commit"),
    *("before_prune", "during_prune", "after_prune"),
)
"""Where `CheckpointStore.save` calls its `fault` hook, in order; the prune points once per pruned folder."""


class CheckpointStore:
    """The checkpoints of one job, in a folder.

    Args:
        folder: Created by the first save.
        keep: Committed checkpoints to keep, at least 1.
        fault: Called with each name of FAULT_POINTS when a save reaches it; tests kill the process there.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2, fault: Callable[[str], None] | None = None) -> None:
        require(isinstance(keep, int) and keep >= 1, "keep", keep, "an integer >= 1")
        self.folder = Path(folder)
        self.keep = keep
        self._fault = fault or (lambda point: None)

    def committed(self) -> list[Path]:
        """All committed checkpoints, oldest first; not checked for damage."""
        found = sorted(self.folder.glob(f"{PREFIX}*")) if self.folder.is_dir() else []
        return [path for path in found if (path / MARKER).is_file()]

    def latest(self) -> Path:
        """The newest committed checkpoint.

        Raises:
            CheckpointError: there is none.
        """
        if not (found := self.committed()):
            raise CheckpointError(f"{self.folder}: no committed checkpoint")
        return found[-1]

    def save(self, arrays: dict[str, Any], state: dict[str, Any]) -> Path:
        """Writes a checkpoint; when this returns, it is on disk as the newest one, and old ones have been removed.

        Args:
            arrays: Pytrees of jax or numpy arrays by name, e.g. {"master", "opt_state", "grads"}; stored
                bit for bit.
            state: JSON data, e.g. `Job.state_dict()` and the base's fingerprint.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: two arrays with the same name, or state that is not JSON: nothing is written. Or a write
                fails (a full or read-only disk): the partial checkpoint is removed, and earlier ones are kept.
        """
        flat = _flatten(arrays)
        try:
            text = json.dumps({"format": FORMAT, "state": state}, allow_nan=False, indent=1)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"state: {error}; expected JSON data") from error
        number = 1 + max((int(p.name.rpartition("-")[2]) for p in self._all()), default=0)
        aside, final = self.folder / f"{ASIDE}{number:08d}", self.folder / f"{PREFIX}{number:08d}"
        for left in self.folder.glob(f"{ASIDE}*"):  # of a killed or failed save: makes room for this one
            shutil.rmtree(left, ignore_errors=True)
        try:
            self._write(aside, final, flat, text)
        except BaseException as error:
            self._clear(aside, final)
            if isinstance(error, Exception):  # orbax raises many types
                raise CheckpointError(f"{final}: cannot be written: {error!s:.500}") from error
            raise
        try:
            self._prune()
        except OSError as error:
            log.warning("%s: old checkpoints cannot be removed, the next save tries again: %s", self.folder, error)
        return final

    def _write(self, aside: Path, final: Path, flat: dict[str, np.ndarray], text: str) -> None:
        import orbax.checkpoint as ocp  # late: it takes a while, and most processes save no job

        aside.mkdir(parents=True)
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(aside.absolute() / "arrays", flat)
        (aside / "state.json").write_text(text)
        _sync_tree(aside)
        self._fault("before_rename")
        aside.rename(final)
        _sync(self.folder)
        self._fault("after_rename")
        self._commit(final)

    @staticmethod
    def _clear(aside: Path, final: Path) -> None:
        """Removes a partial checkpoint, which would otherwise keep a full disk full."""
        for _ in range(CLEARS):
            shutil.rmtree(aside, ignore_errors=True)
            if not aside.exists():
                break
        if not (final / MARKER).is_file():
            shutil.rmtree(final, ignore_errors=True)

    def _commit(self, path: Path) -> None:
        digests = {str(f.relative_to(path)): _digest(f) for f in sorted(path.rglob("*")) if f.is_file()}
        aside = path / f"{MARKER}.aside"
        aside.write_text(json.dumps(digests, indent=1))
        _sync(aside)
        self._fault("before_commit")
        aside.rename(path / MARKER)
        _sync(path)
        self._fault("after_commit")

    def _prune(self) -> None:
        committed = self.committed()
        keep = set(committed[-self.keep :])
        for path in sorted(set(self._all()) - keep):
            self._fault("before_prune")
            if path in committed:  # uncommitted before its files are deleted
                (path / MARKER).unlink()
                _sync(path)
            self._fault("during_prune")
            shutil.rmtree(path)
            self._fault("after_prune")

    def _all(self) -> list[Path]:
        """All folders written by saves, committed or not."""
        names = (f"{kind}{'[0-9]' * 8}" for kind in (PREFIX, ASIDE))
        return [path for name in names for path in self.folder.glob(name)]


def find_checkpoint(path: str | Path) -> Path:
    """`path` itself if it is a committed checkpoint, else the newest committed one in it.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    return path if (path / MARKER).is_file() else CheckpointStore(path).latest()


def verify(path: str | Path, *names: str) -> None:
    """Checks the sha256 of every file of a committed checkpoint, or only of the files `names`.

    Raises:
        CheckpointError: not committed, or a file is missing, unreadable or changed; names it.
    """
    path = Path(path)
    if not (path / MARKER).is_file():
        raise CheckpointError(f"{path}: not a committed checkpoint")
    digests = _digests(path / MARKER)
    for name, expected in ((name, digests[name]) for name in names or digests):
        try:
            got = _digest(path / name)
        except (OSError, ValueError) as error:  # ValueError: a null byte in the name
            where, why = f"{path / name!s:.500}", f"{error!s:.500}"
            raise CheckpointError(f"{where}: cannot be read ({why}): the checkpoint is damaged") from error
        if got != expected:
            raise CheckpointError(f"{path / name}: changed since it was written: the checkpoint is damaged")


def read_state(path: str | Path, *, whole: bool = True) -> dict[str, Any]:
    """The JSON state of a committed checkpoint, after verifying all of its files (`whole`) or only the state.

    Raises:
        CheckpointError: see `verify`; names an intact checkpoint of the same folder, if any. Or another format.
    """
    path = Path(path)
    try:
        verify(path, *(() if whole else ("state.json",)))
        saved = _object(path / "state.json")
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_offer(path)}") from error
    if saved.get("format") != FORMAT or not isinstance(saved.get("state"), dict):
        raise CheckpointError(f"{path}: got format {short(saved.get('format'))}, expected {FORMAT} and a state")
    return saved["state"]


def _digests(marker: Path) -> dict[str, str]:
    found = _object(marker)
    if "state.json" not in found or not all(isinstance(digest, str) for digest in found.values()):
        raise CheckpointError(
            f"{marker}: not a list of files with their sha256: the checkpoint is damaged, or of an older version"
        )
    return found


def _object(file: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}): the checkpoint is damaged") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: got {short(found)}, expected an object: the checkpoint is damaged")
    return found


def _offer(path: Path) -> str:
    """Advice on what to use instead of a damaged checkpoint."""
    for other in reversed(CheckpointStore(path.parent).committed()):
        if other.name != path.name:
            try:
                verify(other)
            except CheckpointError:
                continue
            return f"the newest intact one in its folder is {other}: resume from that, or remove the damaged one"
    return "there is no intact one in its folder"


def read_arrays(path: str | Path, like: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a committed checkpoint, on the host.

    Args:
        path: The checkpoint.
        like: Their structure when saved; leaves have a shape and a dtype (arrays, ShapeDtypeStructs).

    Returns:
        `like` with numpy arrays.

    Raises:
        CheckpointError: an array is missing, unexpected, or of another shape or dtype, or they cannot be read.
    """
    import orbax.checkpoint as ocp

    folder = Path(path).absolute() / "arrays"
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            saved = checkpointer.restore(folder)
    except Exception as error:  # orbax raises many types
        raise CheckpointError(f"{folder}: cannot be read: {error!s:.500}") from error
    if not isinstance(saved, dict) or not all(hasattr(array, "shape") for array in saved.values()):
        raise CheckpointError(f"{folder}: got {short(saved, 200)}, expected arrays by name")
    leaves, tree = jax.tree_util.tree_flatten_with_path(like)
    expected = {_name(key): leaf for key, leaf in leaves}
    for name in sorted(expected.keys() | saved.keys()):
        if (name in saved) != (name in expected):
            raise CheckpointError(f"{path}: array {name!r} is {'unexpected' if name in saved else 'missing'}")
        got, want = saved[name], expected[name]
        if got.shape != tuple(want.shape) or got.dtype != want.dtype:
            found, asked = f"{got.dtype}{list(got.shape)}", f"{want.dtype}{list(want.shape)}"
            raise CheckpointError(f"{path}: array {name!r}: got {found}, expected {asked}")
    return jax.tree.unflatten(tree, [saved[_name(key)] for key, _ in leaves])


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="|")


def _flatten(arrays: dict[str, Any]) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(arrays))
    flat = {_name(path): np.asarray(leaf) for path, leaf in leaves}
    if len(flat) != len(leaves):
        raise CheckpointError("arrays: two arrays have the same name")
    return flat


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    """fsync of a file or folder: a rename must not reach the disk before the contents."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
