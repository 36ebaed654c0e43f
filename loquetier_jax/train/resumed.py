"""What a job is resumed from, and where it writes from then on."""

import itertools
import logging
from pathlib import Path
from typing import Any, NamedTuple

from loquetier_jax.train.checkpoint import CheckpointStore, find_checkpoint
from loquetier_jax.train.run_folder import CHECKPOINTS

log = logging.getLogger(__name__)


class Resumed(NamedTuple):
    """What a job is resumed from.

    Attributes:
        checkpoint: A committed one.
        home: The run folder that was given, or None where a checkpoint, or a folder of them, was.
    """

    checkpoint: Path
    home: Path | None

    def settle_folder(self, saved: dict[str, Any]) -> None:
        """Sets where the job writes: to the folder of its run that was given, to its own, or to a new one.

        It goes on in its own where the checkpoint is the newest one there. An older one, or a copy elsewhere, begins a
        branch in a new folder: what the run wrote afterwards is not the branch's to remove.

        Args:
            saved: From `Job.state_dict`; changed in place.
        """
        config = saved["config"]
        if self.home is not None:
            config["output_dir"] = str(self.home)
        elif config["output_dir"] is not None and not self._is_newest_of(config["output_dir"]):
            branch = branch_folder(config["output_dir"])
            log.warning(
                "job %s: branches off, and writes to %s: %s is not the newest checkpoint of %s",
                *(saved["name"], branch, self.checkpoint, config["output_dir"]),
            )
            config["output_dir"], saved["record"]["position"] = str(branch), None

    def _is_newest_of(self, output_dir: str) -> bool:
        newest = CheckpointStore(Path(output_dir) / CHECKPOINTS).committed()[-1:]
        return [path.resolve() for path in newest] == [self.checkpoint.resolve()]


def find_resumed(path: Path) -> Resumed:
    """The checkpoint to resume from: `path` itself, the newest in it, or the newest of the run folder it is.

    Raises:
        CheckpointError: there is none.
    """
    home = path if (path / CHECKPOINTS).is_dir() else None
    return Resumed(find_checkpoint(home / CHECKPOINTS if home else path), home)


def branch_folder(output_dir: str) -> Path:
    """A folder for a branch of the run of `output_dir`: beside it, and new."""
    numbered = (Path(f"{Path(output_dir)}-branch-{n}") for n in itertools.count(1))
    return next(path for path in numbered if not path.exists())
