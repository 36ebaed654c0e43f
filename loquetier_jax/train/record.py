"""What a job has to report: sums of the step under way, lines of metrics, and where they are written."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from loquetier_jax.train.evaluate import Tally
from loquetier_jax.train.metrics import MetricsWriter


class Record:
    """The numbers of one job.

    Args:
        writer: Where lines go, or None; they are in `lines` in any case.
        clock: Wall-clock seconds.

    Attributes:
        lines: Lines written by this object.
        tally: Of the optimizer step under way.
        num_tokens: Tokens trained on so far, those without a target included.
    """

    def __init__(self, writer: MetricsWriter | None = None, clock: Callable[[], float] = time.time) -> None:
        self.writer = writer
        self.lines: list[dict[str, Any]] = []
        self.tally = Tally()
        self.num_tokens = 0
        self._clock = clock
        self._losses: list[float] = []  # of the steps since the last line, and their targets:
        self._targets = 0
        self._correct: int | None = 0

    def close_step(self) -> None:
        """Moves the step under way to those that the next line is about."""
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
        """Adds step, time and epoch to a line; appends it to `lines` and to the file."""
        line = {"step": step, "time": self._clock(), "epoch": epoch} | line
        self.lines.append(line)
        if self.writer is not None:
            self.writer.write(line)

    def sync(self) -> None:
        """Forces the file to the disk; in any thread. Raises OSError where that cannot be."""
        if self.writer is not None:
            self.writer.sync()

    def close(self) -> None:
        """Nothing more will be written: other processes may use the folder."""
        if self.writer is not None:
            self.writer.close()

    def state_dict(self) -> dict[str, Any]:
        """JSON data; `position` promises so much of the file: `sync` it before a checkpoint counts.

        Raises OSError where the disk does not take the lines.
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
        """The inverse of `state_dict`; cuts the file back to where the state was taken.

        Raises:
            CheckpointError: the file is shorter than it was.
        """
        if self.writer is not None and state["position"] is not None:
            self.writer.truncate(state["position"])
        self.tally, self.num_tokens = Tally(**state["tally"]), state["num_tokens"]
        self._losses, self._targets, self._correct = list(state["losses"]), state["targets"], state["correct"]
