"""The progress bar of fine-tuning jobs: step, loss, learning rate, tokens per second."""

import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from loquetier_jax.faces.jobs import JobHandle

COLUMNS = (
    SpinnerColumn(),
    TextColumn("{task.description}"),
    BarColumn(bar_width=None),
    MofNCompleteColumn(),
    TextColumn("{task.fields[numbers]}"),
    TimeRemainingColumn(),
)
PLAIN_EVERY_S = 10.0  # between two lines where there is no terminal


class JobBar:
    """One bar per job on a terminal, a line every few seconds elsewhere.

    Args:
        console: Where.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(*COLUMNS, console=console, disable=not console.is_terminal)
        self._tasks: dict[str, int] = {}
        self._seen: dict[str, int] = {}
        self._first: dict[str, tuple[float, int]] = {}  # when the first line of this process came, and its tokens
        self._next_plain = time.perf_counter() + PLAIN_EVERY_S

    def __enter__(self) -> "JobBar":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, job: "JobHandle") -> None:
        """Shows where a job is; cheap when nothing has happened."""
        if job.name not in self._tasks:
            self._tasks[job.name] = self._progress.add_task(
                job.name, total=job.total_steps, numbers="compiling", completed=job.step
            )
        lines = [line for line in job.metrics if line["step"]]  # that of step 0 is about the data
        if len(lines) == self._seen.get(job.name, 0):
            return
        self._seen[job.name] = len(lines)
        numbers = self._numbers(job.name, lines)
        self._progress.update(self._tasks[job.name], completed=job.step, numbers=numbers)
        ended = job.step >= job.total_steps
        if not self._console.is_terminal and (ended or time.perf_counter() >= self._next_plain):
            self._next_plain = time.perf_counter() + PLAIN_EVERY_S
            self._console.print(f"{job.name} {job.step}/{job.total_steps} {numbers}", highlight=False)

    def _numbers(self, name: str, lines: list[dict]) -> str:
        now = time.perf_counter()
        last = {key: value for line in lines for key, value in line.items()}
        tokens = last.get("num_tokens", 0)
        start, before = self._first.setdefault(name, (now, tokens))
        shown = [f"loss {last['loss']:.3f}"] if "loss" in last else []
        shown += [f"eval {last['eval_loss']:.3f}"] if "eval_loss" in last else []
        shown += [f"lr {last['learning_rate']:.1e}"] if "learning_rate" in last else []
        shown += [f"{(tokens - before) / (now - start):,.0f} tok/s"] if now > start else []
        return "  ".join(shown)
