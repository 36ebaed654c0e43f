"""The status of a job, with OpenAI's names, and its transitions."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from loquetier_jax.errors import JobError

log = logging.getLogger(__name__)

Status = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
FINISHED: tuple[Status, ...] = ("succeeded", "failed", "cancelled")
UNFINISHED: tuple[Status, ...] = ("queued", "running", "paused")


class Lifecycle:
    """A job's status; invalid transitions raise JobError with the job's name and status.

    Args:
        name: The job's name.

    Attributes:
        status: One of Status.
        error: Why it failed, or None.
        paused_from: The status that `resume` restores.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.status: Status = "queued"
        self.error: str | None = None
        self.paused_from: Status = "running"

    @property
    def finished(self) -> bool:
        """Whether the job has ended for good."""
        return self.status in FINISHED

    def start(self) -> None:
        """queued -> running."""
        self._move("start", ("queued",), "running")

    def pause(self) -> None:
        """Stops issuing packs; those in flight, and an optimizer step already dispatched, still finish."""
        before = self.status
        self._move("pause", ("queued", "running"), "paused")
        self.paused_from = before

    def resume(self) -> None:
        """paused -> its previous status."""
        self._move("resume", ("paused",), self.paused_from)

    def cancel(self) -> None:
        """Ends the job; results in flight are dropped."""
        self._move("cancel", UNFINISHED, "cancelled")
        self._drop()

    def fail(self, error: str) -> None:
        """Ends the job with an error; results in flight are dropped."""
        self._move("fail", UNFINISHED, "failed")
        self.error = error
        self._drop()

    @contextmanager
    def fail_on_error(self) -> Iterator[None]:
        """Errors raised inside, e.g. by the job's loss function or files, fail only this job."""
        try:
            yield
        except Exception as error:
            log.exception("job %s", self.name)
            if self.finished:
                self.error = f"after its end: {error}"
            else:
                self.fail(f"{type(error).__name__}: {error}")

    def _drop(self) -> None:
        """Drops results in flight."""

    def _move(self, what: str, allowed: tuple[Status, ...], to: Status) -> None:
        if self.status not in allowed:
            expected = " or ".join(allowed)
            raise JobError(f"job {self.name!r}: cannot {what}: it is {self.status}, expected {expected}")
        self.status = to
