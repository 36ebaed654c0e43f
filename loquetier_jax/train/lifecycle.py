"""The statuses of a job, in OpenAI's words, and the moves between them."""

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
    """A job's status; every move that makes no sense is a JobError naming the job and its status.

    Args:
        name: Of the job.

    Attributes:
        status: One of Status.
        error: Why it failed, or None.
        paused_from: What `resume` goes back to.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.status: Status = "queued"
        self.error: str | None = None
        self.paused_from: Status = "running"

    @property
    def finished(self) -> bool:
        """Whether it will never run again."""
        return self.status in FINISHED

    def start(self) -> None:
        """queued -> running."""
        self._move("start", ("queued",), "running")

    def pause(self) -> None:
        """No further pack is handed out; those in flight, and a step already dispatched, still finish."""
        before = self.status
        self._move("pause", ("queued", "running"), "paused")
        self.paused_from = before

    def resume(self) -> None:
        """paused -> what it was before."""
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
        """Fails the job for what is raised inside: its loss function and its files are nobody else's trouble."""
        try:
            yield
        except Exception as error:
            log.exception("job %s", self.name)
            if self.finished:
                self.error = f"after its end: {error}"
            else:
                self.fail(f"{type(error).__name__}: {error}")

    def _drop(self) -> None:
        """Forgets what is in flight."""

    def _move(self, what: str, allowed: tuple[Status, ...], to: Status) -> None:
        if self.status not in allowed:
            expected = " or ".join(allowed)
            raise JobError(f"job {self.name!r}: cannot {what}: it is {self.status}, expected {expected}")
        self.status = to
