"""Checkpoints on disk that a kill at any moment cannot spoil: written aside, renamed, then marked committed.

    folder/checkpoint-00000007/{arrays/ (orbax), state.json, COMMITTED}

COMMITTED lists every file with its sha256: what a disk or a copy has changed is noticed, and never loaded. A folder
without it does not exist for a reader, and is removed by the next save. One process writes to a folder at a time.
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
import orbax.checkpoint as ocp

from loquetier_jax.config import require
from loquetier_jax.errors import CheckpointError, short

log = logging.getLogger(__name__)

FORMAT = 2
MARKER = "COMMITTED"
PREFIX = "checkpoint-"
ASIDE = ".writing-"
CLEARS = 10  # orbax's writers of a save that failed may still be making files
FAULT_POINTS = (
    *("before_rename", "after_rename", "before_commit", "after_commit"),
    *("before_prune", "during_prune", "after_prune"),
)
"""Where `CheckpointStore.save` calls its `fault` hook, in order; the prune ones once per pruned folder."""


class CheckpointStore:
    """The checkpoints of one job in a folder, newest last.

    Args:
        folder: Made on the first save.
        keep: Committed checkpoints that stay, at least 1.
        fault: Called with each name of FAULT_POINTS as a save gets there; tests kill the process in it.
    """

    def __init__(
        self, folder: str | Path, *, keep: int = 2, fault: Callable[[str], None] | None = None
    ) -> None:
        require(isinstance(keep, int) and keep >= 1, "keep", keep, "an integer >= 1")
        self.folder = Path(folder)
        self.keep = keep
        self._fault = fault or (lambda point: None)

    def committed(self) -> list[Path]:
        """All checkpoints whose save came to its end, oldest first; whether they are damaged is not looked at."""
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
        """Writes a checkpoint; when this returns it is on the disk and the newest, and old ones are gone.

        Args:
            arrays: Pytrees of jax or numpy arrays by name, e.g. {"master", "opt_state", "grads"}; stored
                bit by bit.
            state: JSON data, e.g. `Job.state_dict()` and what identifies the base.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: two arrays of one name, state that is not JSON; nothing is written. Or it cannot be written
                (a full or a read-only disk): what there is of it is removed, the checkpoints before it stay.
        """
        flat = _flatten(arrays)
        try:
            text = json.dumps({"format": FORMAT, "state": state}, allow_nan=False, indent=1)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"state: {error}; expected JSON data") from error
        number = 1 + max((int(p.name.rpartition("-")[2]) for p in self._all()), default=0)
        aside, final = self.folder / f"{ASIDE}{number:08d}", self.folder / f"{PREFIX}{number:08d}"
        for left in self.folder.glob(f"{ASIDE}*"):  # of a save that was killed, or that failed: room for this one
            shutil.rmtree(left, ignore_errors=True)
        try:
            self._write(aside, final, flat, text)
        except BaseException as error:
            self._clear(aside, final)
            if isinstance(error, Exception):  # orbax raises what its writers trip over
                raise CheckpointError(f"{final}: cannot be written: {error!s:.500}") from error
            raise
        try:
            self._prune()
        except OSError as error:
            log.warning("%s: old checkpoints cannot be removed, the next save tries again: %s", self.folder, error)
        return final

    def _write(self, aside: Path, final: Path, flat: dict[str, np.ndarray], text: str) -> None:
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
        """Removes what a save that failed has left: half a checkpoint would fill the disk that had no room for one."""
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
            if path in committed:  # not readable any more before its files go
                (path / MARKER).unlink()
                _sync(path)
            self._fault("during_prune")
            shutil.rmtree(path)
            self._fault("after_prune")

    def _all(self) -> list[Path]:
        """Whatever saves have left here, committed or not."""
        names = (f"{kind}{'[0-9]' * 8}" for kind in (PREFIX, ASIDE))
        return [path for name in names for path in self.folder.glob(name)]


def find_checkpoint(path: str | Path) -> Path:
    """`path` itself if it is a committed checkpoint, else the newest one in it.

    Raises:
        CheckpointError: neither.
    """
    path = Path(path)
    return path if (path / MARKER).is_file() else CheckpointStore(path).latest()


def verify(path: str | Path, *names: str) -> None:
    """Reads every file of a committed checkpoint once, or those of `names` alone.

    Raises:
        CheckpointError: not committed, or a file is missing, unreadable or not what was written; names it.
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
            raise CheckpointError(f"{path / name}: is not what was written: the checkpoint is damaged")


def read_state(path: str | Path, *, whole: bool = True) -> dict[str, Any]:
    """The JSON state of a committed checkpoint; all of its files are verified first, or the state alone.

    Raises:
        CheckpointError: see `verify`, which of the others in its folder is good then; or another format.
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
            f"{marker}: does not list files with their sha256: the checkpoint is damaged, or of an older version"
        )
    return found


def _object(file: Path) -> dict[str, Any]:
    """The JSON object that a file holds."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}): the checkpoint is damaged") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: got {short(found)}, expected an object: the checkpoint is damaged")
    return found


def _offer(path: Path) -> str:
    """What to take instead of a checkpoint that is damaged."""
    for other in reversed(CheckpointStore(path.parent).committed()):
        if other.name != path.name:
            try:
                verify(other)
            except CheckpointError:
                continue
            return f"the newest good one beside it is {other}: resume from that, or remove the damaged folder"
    return "there is no good one beside it"


def read_arrays(path: str | Path, like: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a committed checkpoint, on the host.

    Args:
        path: The checkpoint.
        like: The structure they had when saved; leaves have a shape and a dtype (arrays, ShapeDtypeStructs).

    Returns:
        `like` with numpy arrays.

    Raises:
        CheckpointError: an array is missing, left over, or of another shape or dtype, or they cannot be read.
    """
    folder = Path(path).absolute() / "arrays"
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            saved = checkpointer.restore(folder)
    except Exception as error:  # its readers of files raise what they trip over
        raise CheckpointError(f"{folder}: cannot be read: {error!s:.500}") from error
    if not isinstance(saved, dict) or not all(hasattr(array, "shape") for array in saved.values()):
        raise CheckpointError(f"{folder}: got {short(saved, 200)}, expected arrays by name")
    leaves, tree = jax.tree_util.tree_flatten_with_path(like)
    expected = {_name(key): leaf for key, leaf in leaves}
    for name in sorted(expected.keys() | saved.keys()):
        if (name in saved) != (name in expected):
            raise CheckpointError(f"{path}: array {name!r} is {'left over' if name in saved else 'missing'}")
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
        raise CheckpointError("arrays: two of them have the same name")
    return flat


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    """fsync of a file or a folder: a rename must not reach the disk before what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
