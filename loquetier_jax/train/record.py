"""A job's metrics: sums of the current step, and the lines written so far."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from loquetier_jax.train.evaluate import Tally
from loquetier_jax.train.metrics import MetricsWriter


class Record:
    """The metrics of one job.

    Args:
        writer: Writes lines to a file, or None; `lines` has them in any case.
        clock: Returns wall-clock seconds.

    Attributes:
        lines: Lines written by this object.
        tally: Sums of the current optimizer step.
        num_tokens: Tokens trained on so far, including those without a target.
    """

    def __init__(self, writer: MetricsWriter | None = None, clock: Callable[[], float] = time.time) -> None:
        self.writer = writer
        self.lines: list[dict[str, Any]] = []
        self.tally = Tally()
        self.num_tokens = 0
        self._clock = clock
        self._losses: list[float] = []  # of the steps since the last line, like the next two
        self._targets = 0
        self._correct: int | None = 0

    def close_step(self) -> None:
        """Adds the current step to the steps that the next line covers."""
        tally = self.tally
        self._losses.append(tally.loss)
        self._targets += tally.targets
        known = self._correct is not None and tally.correct is not None
        self._correct = self._correct + tally.correct if known else None
        self.num_tokens += tally.tokens
        self.tally = Tally()

    def steps_line(self) -> dict[str, float]:
        """{"loss" (mean of the steps since the last call), "num_tokens", "mean_token_accuracy" if known}."""
        line = {"loss": math.fsum(self._losses) / len(self._losses), "num_tokens": self.num_tokens}
        if self._correct is not None:
            line["mean_token_accuracy"] = self._correct / self._targets
        self._losses, self._targets, self._correct = [], 0, 0
        return line

    def write(self, step: int, epoch: float, line: dict[str, Any]) -> None:
        """Adds step, time and epoch to a line; appends it to `lines` and the file."""
        line = {"step": step, "time": self._clock(), "epoch": epoch} | line
        self.lines.append(line)
        if self.writer is not None:
            self.writer.write(line)

    def sync(self) -> None:
        """Flushes the file to disk (fsync); thread-safe. Raises OSError if that fails."""
        if self.writer is not None:
            self.writer.sync()

    def close(self) -> None:
        """Unlocks the folder for other processes; nothing may be written afterwards."""
        if self.writer is not None:
            self.writer.close()

    def state_dict(self) -> dict[str, Any]:
        """JSON data. `sync` the file before committing a checkpoint: `position` refers to its contents.

        Raises OSError if pending lines cannot be written.
        """
        if self.writer is not None:
            self.writer.flush()
        return {
            "tally": asdict(self.tally),
            "num_tokens": self.num_tokens,
            "losses": list(self._losses),
            "targets": self._targets,
            "correct": self._correct,
            "position": None if self.writer is None else self.writer.position(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; truncates the file to its length when the state was taken.

        Raises:
            CheckpointError: the file is shorter than it was.
        """
        if self.writer is not None and state["position"] is not None:
            self.writer.truncate(state["position"])
        self.tally, self.num_tokens = Tally(**state["tally"]), state["num_tokens"]
        self._losses, self._targets, self._correct = list(state["losses"]), state["targets"], state["correct"]
