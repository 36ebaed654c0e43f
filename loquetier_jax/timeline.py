"""A recording of a run: losses, tokens and gaps between tokens, on one clock. Imports no jax."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from loquetier_jax.serve.output import StreamPiece

Points = list[tuple[float, float]]  # (seconds from the start, value)


@dataclass
class Timeline:
    """Records a run.

    Attributes:
        clock: The engine's clock, seconds.
        start: Its value when recording began; all times are relative to it.
        losses: Job name -> loss after each optimizer step.
        trained: Job name -> tokens trained on so far.
        tokens: When each output token was read.
        gaps: Milliseconds between consecutive output tokens of a request.
        marks: Events to draw a line at, e.g. a publish.
    """

    clock: Callable[[], float]
    start: float = 0.0
    losses: dict[str, Points] = field(default_factory=dict)
    trained: dict[str, Points] = field(default_factory=dict)
    tokens: list[float] = field(default_factory=list)
    gaps: Points = field(default_factory=list)
    marks: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start = self.start or self.clock()

    @property
    def now(self) -> float:
        """Seconds since recording began."""
        return self.clock() - self.start

    def watch(self, job: Any) -> None:
        """Records the metrics that a JobHandle has added since the last call."""
        losses, trained = self.losses.setdefault(job.name, []), self.trained.setdefault(job.name, [])
        for line in [line for line in job.metrics if "loss" in line][len(losses) :]:
            losses.append((self.now, line["loss"]))
            trained.append((self.now, line["num_tokens"]))

    def listener(self) -> "Callable[[StreamPiece], None]":
        """A listener for one request."""
        last: list[float] = []

        def take(piece: "StreamPiece") -> None:
            for _ in piece.token_ids:
                now = self.now
                self.tokens.append(now)
                self.gaps += [(now, 1e3 * (now - last[0]))] if last else []
                last[:] = [now]

        return take

    def mark(self, text: str) -> None:
        """Records an event."""
        self.marks.append((self.now, text))

    @property
    def training_since(self) -> float | None:
        """When the first optimizer step of any job was read, or None; before that, training functions compile."""
        return min((points[0][0] for points in self.losses.values() if points), default=None)

    def output_rate(self, window_s: float) -> float:
        """Output tokens per second over the last `window_s` seconds."""
        since = self.now - window_s
        return sum(t > since for t in reversed(self.tokens)) / window_s

    def training_rate(self, window_s: float) -> float:
        """Trained tokens per second over the last `window_s` seconds, summed over jobs."""
        since, total = self.now - window_s, 0.0
        for points in self.trained.values():
            before = [value for t, value in points if t <= since]
            total += points[-1][1] - (before[-1] if before else 0) if points else 0
        return total / window_s

    def rates(self, window_s: float = 1.0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """{"output", "training"} -> (window centers in seconds, tokens per second), for consecutive windows."""
        trained: list[float] = []
        weights: list[float] = []
        for points in self.trained.values():
            trained += [t for t, _ in points]
            weights += np.diff([0.0, *(value for _, value in points)]).tolist()
        end = max([window_s, *self.tokens, *trained])
        edges = np.arange(0.0, end + window_s, window_s)
        middles = (edges[:-1] + edges[1:]) / 2
        output, _ = np.histogram(self.tokens, edges)
        training, _ = np.histogram(trained, edges, weights=weights)
        return {"output": (middles, output / window_s), "training": (middles, training / window_s)}
