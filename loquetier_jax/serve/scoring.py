"""The queue of packs to score, shared by log_probs, prompt_logprobs and job evaluations."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from loquetier_jax.batch.pack import ScoreItem
from loquetier_jax.batch.packs import Pack
from loquetier_jax.errors import AdapterError, CapacityError
from loquetier_jax.schedule.types import ScoreView

AHEAD = 8  # packs of opened tasks to keep ready; opening a task keeps its adapter on the device

Scores = dict[str, np.ndarray]


@dataclass(eq=False)
class ScoreTask:
    """Packs to score under one adapter, in order.

    Attributes:
        packs: The packs.
        open: Called before the first pack is dispatched; returns the adapter's pages, which stay on the device until
            `on_done`. On a CapacityError the task waits while later ones overtake it.
        on_done: Called once with the scores of all packs, in order (see `step.head.score_rows`).
        on_error: Called instead if `open` finds that the adapter cannot be read.
        sent: Packs dispatched so far.
        scores: Scores read so far.
        pages: The result of `open`; None before.
    """

    packs: list[Pack]
    open: Callable[[], tuple[int, ...]]
    on_done: Callable[[list[Scores]], None]
    on_error: Callable[[AdapterError], None]
    sent: int = 0
    scores: list[Scores] = field(default_factory=list)
    pages: tuple[int, ...] | None = None


class Scoring:
    """Score tasks, first come, first served among those whose adapter has room. A step may mix packs of several."""

    def __init__(self) -> None:
        self._waiting: dict[str, ScoreTask] = {}
        self._ids = itertools.count()

    def __len__(self) -> int:
        """Number of tasks with packs not yet dispatched."""
        return len(self._waiting)

    def add(self, task: ScoreTask) -> None:
        """Queues a task; a task without packs completes immediately."""
        if task.packs:
            self._waiting[str(next(self._ids))] = task
        else:
            task.on_done([])

    def open(self) -> None:
        """Opens tasks in order, until AHEAD packs are ready.

        A task without room must not block the others, or an evaluation queued behind it could deadlock: the pages it
        waits for may belong to that job.
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
        """Scheduler views of the opened tasks, in order of arrival."""
        return tuple(
            ScoreView(id=name, tokens=max(len(p.tokens) for p in t.packs), packs=len(t.packs) - t.sent)
            for name, t in self._waiting.items()
            if t.pages is not None
        )

    def take(self, names: Sequence[str]) -> tuple[list[ScoreItem], list[ScoreTask]]:
        """The next pack of each named task, for a step about to be dispatched, and the tasks."""
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
        """Delivers scores to their tasks.

        Args:
            tasks: As returned by `take`.
            scores: Numpy arrays over all score rows of the step.
            rows: Rows of a score pack in the step's bucket; shorter packs were padded.
        """
        for g, task in enumerate(tasks):
            size = len(task.packs[len(task.scores)].tokens)
            task.scores.append({name: value[g * rows : g * rows + size] for name, value in scores.items()})
            if len(task.scores) == len(task.packs):
                task.on_done(task.scores)
