"""Packs waiting to be scored: log_probs, prompt_logprobs and the evaluation of jobs. They share one queue."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from loquetier_jax.batch.pack import ScoreItem
from loquetier_jax.batch.packs import Pack
from loquetier_jax.errors import AdapterError, CapacityError
from loquetier_jax.schedule.types import ScoreView

AHEAD = 8  # packs of opened tasks shown to the scheduler: their adapters stay on the device meanwhile

Scores = dict[str, np.ndarray]


@dataclass(eq=False)
class ScoreTask:
    """Some packs to score under one adapter, in order.

    Attributes:
        packs: The rows.
        open: Called before the first pack is dispatched: the adapter's pages, kept where they are until `on_done`;
            a CapacityError leaves the task waiting, and those behind it pass.
        on_done: Called once with the scores of every pack, in order (see `step.head.score_rows`).
        on_error: Called instead when `open` finds that the adapter cannot be read.
        sent: Packs dispatched so far.
        scores: What has been read so far.
        pages: What `open` returned; None before.
    """

    packs: list[Pack]
    open: Callable[[], tuple[int, ...]]
    on_done: Callable[[list[Scores]], None]
    on_error: Callable[[AdapterError], None]
    sent: int = 0
    scores: list[Scores] = field(default_factory=list)
    pages: tuple[int, ...] | None = None


class Scoring:
    """First come, first served among those whose adapter has room; a step takes packs of several tasks if need be."""

    def __init__(self) -> None:
        self._waiting: dict[str, ScoreTask] = {}
        self._ids = itertools.count()

    def __len__(self) -> int:
        """Tasks with packs that have not been dispatched."""
        return len(self._waiting)

    def add(self, task: ScoreTask) -> None:
        """Queues a task; one without packs is done at once."""
        if task.packs:
            self._waiting[str(next(self._ids))] = task
        else:
            task.on_done([])

    def open(self) -> None:
        """Opens the first tasks that can be, until there are AHEAD packs to choose from.

        One that has no room must not hold up the others: what it waits for may be pages of a job whose evaluation
        is behind it.
        """
        ready = 0
        for name, task in list(self._waiting.items()):
            if task.pages is None:
                try:
                    task.pages = task.open()
                except CapacityError:
                    continue
                except AdapterError as error:
                    del self._waiting[name]
                    task.on_error(error)
                    continue
            ready += len(task.packs) - task.sent
            if ready >= AHEAD:
                return

    def views(self) -> tuple[ScoreView, ...]:
        """What can be scored now, for the scheduler, in order of arrival."""
        return tuple(
            ScoreView(id=name, tokens=max(len(p.tokens) for p in t.packs), packs=len(t.packs) - t.sent)
            for name, t in self._waiting.items()
            if t.pages is not None
        )

    def take(self, names: Sequence[str]) -> tuple[list[ScoreItem], list[ScoreTask]]:
        """The next pack of each named view, for a step about to be dispatched, and the task of each."""
        items: list[ScoreItem] = []
        tasks: list[ScoreTask] = []
        for name in names:
            task = self._waiting[name]
            items.append(ScoreItem(task.packs[task.sent], task.pages))
            tasks.append(task)
            task.sent += 1
            if task.sent == len(task.packs):
                del self._waiting[name]
        return items, tasks

    def accept(self, tasks: list[ScoreTask], scores: Scores, rows: int) -> None:
        """Hands read scores to their tasks.

        Args:
            tasks: As `take` returned them.
            scores: Numpy, over all score rows of the step.
            rows: Rows of a score pack in the step's bucket; a shorter pack was padded.
        """
        for g, task in enumerate(tasks):
            size = len(task.packs[len(task.scores)].tokens)
            task.scores.append({name: value[g * rows : g * rows + size] for name, value in scores.items()})
            if len(task.scores) == len(task.packs):
                task.on_done(task.scores)
