"""Packs waiting to be scored: log_probs, prompt_logprobs and the evaluation of jobs. They share one queue."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from loquetier_jax.batch.pack import ScoreItem
from loquetier_jax.errors import CapacityError
from loquetier_jax.jobs.data import Pack
from loquetier_jax.schedule.snapshot import ScoreView

Scores = dict[str, np.ndarray]


@dataclass(eq=False)
class ScoreTask:
    """Some packs to score under one adapter, in order.

    Attributes:
        packs: The rows.
        open: Called before the first pack is dispatched: the adapter's pages, kept where they are until `on_done`;
            a CapacityError leaves the task waiting.
        on_done: Called once with the scores of every pack, in order (see `step.loss.score_rows`).
        sent: Packs dispatched so far.
        scores: What has been read so far.
    """

    packs: list[Pack]
    open: Callable[[], tuple[int, ...]]
    on_done: Callable[[list[Scores]], None]
    sent: int = 0
    scores: list[Scores] = field(default_factory=list)
    pages: tuple[int, ...] = ()


class Scoring:
    """First come, first served; a step takes as many packs as its bucket holds, of several tasks if need be."""

    def __init__(self) -> None:
        self._waiting: deque[ScoreTask] = deque()

    def add(self, task: ScoreTask) -> None:
        """Queues a task; one without packs is done at once."""
        if task.packs:
            self._waiting.append(task)
        else:
            task.on_done([])

    def views(self) -> tuple[ScoreView, ...]:
        """What waits, for the scheduler, in order of arrival."""
        return tuple(
            ScoreView(id=str(i), tokens=max(len(p.tokens) for p in t.packs), packs=len(t.packs) - t.sent)
            for i, t in enumerate(self._waiting)
        )

    def take(self, count: int) -> tuple[list[ScoreItem], list[ScoreTask]]:
        """Up to `count` packs for a step about to be dispatched, and the task of each."""
        items: list[ScoreItem] = []
        tasks: list[ScoreTask] = []
        while self._waiting and len(items) < count:
            task = self._waiting[0]
            if not task.sent:
                try:
                    task.pages = task.open()
                except CapacityError:
                    break
            items.append(ScoreItem(task.packs[task.sent], task.pages))
            tasks.append(task)
            task.sent += 1
            if task.sent == len(task.packs):
                self._waiting.popleft()
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
