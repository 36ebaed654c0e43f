"""Progress bars for fine-tuning jobs and other work: step, loss, learning rate, tokens per second."""

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
    from loquetier_jax.train.manager import JobHandle

COLUMNS = (
    SpinnerColumn(),
    TextColumn("{task.description}"),
    BarColumn(bar_width=None),
    MofNCompleteColumn(),
    TextColumn("{task.fields[numbers]}"),
    TimeRemainingColumn(),
)
PLAIN_EVERY_S = 10.0  # seconds between lines without a terminal


class JobBar:
    """One bar per job on a terminal, a line every few seconds otherwise.

    Args:
        console: Output console.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(*COLUMNS, console=console, disable=not console.is_terminal)
        self._tasks: dict[str, int] = {}
        self._seen: dict[str, int] = {}
        self._first: dict[str, tuple[float, int]] = {}  # time and tokens of the first line seen by this process
        self._next_plain: dict[str, float] = {}

    def __enter__(self) -> "JobBar":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, job: "JobHandle") -> None:
        """Shows a job's progress; cheap if nothing has changed."""
        self._add(job.name, job.step, job.total_steps, "compiling")
        lines = [line for line in job.metrics if line["step"]]  # the line of step 0 describes the data
        if len(lines) == self._seen.get(job.name, 0):
            return
        self._seen[job.name] = len(lines)
        self.show(job.name, job.step, job.total_steps, self._numbers(job.name, lines))

    def show(self, name: str, completed: int, total: int, numbers: str) -> None:
        """Shows the progress of any named task."""
        self._add(name, completed, total, numbers)
        self._progress.update(self._tasks[name], completed=completed, numbers=numbers)
        now = time.perf_counter()
        if not self._console.is_terminal and (completed >= total or now >= self._next_plain[name]):
            self._next_plain[name] = now + PLAIN_EVERY_S
            self._console.print(f"{name} {completed}/{total} {numbers}", highlight=False)

    def _add(self, name: str, completed: int, total: int, numbers: str) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, numbers=numbers, completed=completed)
            self._next_plain[name] = time.perf_counter() + PLAIN_EVERY_S

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
