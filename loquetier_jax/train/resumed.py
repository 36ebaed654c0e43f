"""The checkpoint that a job is resumed from, and the folder it then writes to."""

import itertools
import logging
from pathlib import Path
from typing import Any, NamedTuple

from loquetier_jax.train.checkpoint import CheckpointStore, find_checkpoint
from loquetier_jax.train.run_folder import CHECKPOINTS

log = logging.getLogger(__name__)


class Resumed(NamedTuple):
    """The source of a resumed job.

    Attributes:
        checkpoint: A committed checkpoint.
        home: The given run folder, or None if a checkpoint or a folder of checkpoints was given.
    """

    checkpoint: Path
    home: Path | None

    def settle_folder(self, saved: dict[str, Any]) -> None:
        """Sets where the job writes: to the given run folder, to its original folder, or to a new one.

        It continues in its original folder if the checkpoint is the newest one there. An older one, or a copy
        elsewhere, starts a branch in a new folder, because the branch must not remove what the run wrote later.

        Args:
            saved: From `Job.state_dict`; modified in place.
        """
        config = saved["config"]
        if self.home is not None:
            config["output_dir"] = str(self.home)
        elif config["output_dir"] is not None and not self._is_newest_of(config["output_dir"]):
            branch = branch_folder(config["output_dir"])
            log.warning(
                "job %s: starting a branch in %s, because %s is not the newest checkpoint of %s",
                *(saved["name"], branch, self.checkpoint, config["output_dir"]),
            )
            config["output_dir"], saved["record"]["position"] = str(branch), None

    def _is_newest_of(self, output_dir: str) -> bool:
        newest = CheckpointStore(Path(output_dir) / CHECKPOINTS).committed()[-1:]
        return [path.resolve() for path in newest] == [self.checkpoint.resolve()]


def find_resumed(path: Path) -> Resumed:
    """The checkpoint to resume from: `path` itself, or the newest one in that folder or run folder.

    Raises:
        CheckpointError: there is none.
    """
    home = path if (path / CHECKPOINTS).is_dir() else None
    return Resumed(find_checkpoint(home / CHECKPOINTS if home else path), home)


def branch_folder(output_dir: str) -> Path:
    """A new folder next to `output_dir`, for a branch of its run."""
    numbered = (Path(f"{Path(output_dir)}-branch-{n}") for n in itertools.count(1))
    return next(path for path in numbered if not path.exists())
