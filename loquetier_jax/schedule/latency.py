"""Predicts the time of each compiled function, and the error of the prediction, from measurements."""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from loquetier_jax.config import require

FORWARD = "forward"  # a bucket's forward
SAMPLER = "sampler"  # after it, if tokens are sampled
FORWARD_SLICE = "forward_slice"  # some layers of train rows
BACKWARD = "backward"  # all layers of train rows
BACKWARD_SLICE = "backward_slice"  # some layers of train rows
OPTIMIZER = "optimizer_step"  # one job; rows are 1

Key = tuple[str, str]
"""(function, bucket name), or a job's name for the optimizer, or "rows-level" for a sampler."""
Run = tuple[Key, int]
"""(key, rows of the function) of one call."""


def sampler_run(rows: int, level: str) -> Run:
    """One call of a sampler."""
    return (SAMPLER, f"{rows}-{level}"), rows


MS_PER_ROW = 0.03  # guess before any measurement: about an 8-billion-parameter forward on one large GPU
CLIP = 2.0  # observations are clipped to at most this factor above or below the mean
WINDOW = 128  # errors remembered per key; the second largest is the 99th percentile
FIRST_ERROR = 0.1  # assumed relative error before any was observed
QUANTILE = 0.99


@dataclass(slots=True)
class Entry:
    """Measurements of one key.

    Attributes:
        rows: Rows of the function, for scaling to unknown keys.
        ms: Running mean, milliseconds.
        count: Number of observations.
        errors: Relative errors of the latest runs: actual / predicted - 1.
        late: Their 99th percentile, at least 0.
    """

    rows: int
    ms: float
    count: int = 1
    errors: deque[float] = field(default_factory=lambda: deque([FIRST_ERROR], maxlen=WINDOW))
    late: float = FIRST_ERROR

    def note_error(self, ms: float) -> None:
        """Records the error of the prediction for a run that took `ms`."""
        self.errors.append(min(ms / self.ms, CLIP) - 1)
        self.late = max(0.0, sorted(self.errors)[math.ceil(QUANTILE * len(self.errors)) - 1])


class LatencyModel:
    """Table of mean milliseconds per key, with a conservative guess for keys never measured."""

    def __init__(self, smoothing: float = 0.1) -> None:
        """Starts empty; `smoothing` is the weight of a new observation once there are many, in (0, 1]."""
        require(0 < smoothing <= 1, "smoothing", smoothing, "a number in (0, 1]")
        self.smoothing = smoothing
        self._table: dict[Key, Entry] = {}

    def known(self, key: Key) -> bool:
        """Whether the key has been measured."""
        return key in self._table

    def seed(self, key: Key, ms: Sequence[float], rows: int) -> None:
        """Sets the mean to the median of warm-up measurements.

        Raises:
            ConfigError: no measurement, one that is not > 0, or rows < 1.
        """
        require(len(ms) > 0 and all(m > 0 for m in ms), f"latency of {key}", list(ms), "times > 0")
        require(rows >= 1, f"rows of {key}", rows, "an integer >= 1")
        self._table[key] = Entry(rows, statistics.median(ms), len(ms))

    def observe(self, key: Key, ms: float, rows: int) -> None:
        """Moves the mean towards one measurement; a single stall has little effect, a lasting change its full effect.

        The first run of a function includes loading it, many times its own duration; a faster second run replaces it.

        Raises:
            ConfigError: ms is not > 0, or rows < 1.
        """
        entry = self._table.get(key)
        if entry is None:
            self.seed(key, [ms], rows)
            return
        require(ms > 0, f"latency of {key}", ms, "a time > 0")
        entry.count += 1
        if entry.count == 2 and ms < entry.ms:
            entry.ms = ms
            return
        entry.note_error(ms)
        clipped = min(max(ms, entry.ms / CLIP), entry.ms * CLIP)
        entry.ms += max(self.smoothing, 1 / entry.count) * (clipped - entry.ms)

    def observe_step(
        self, forward: Sequence[Run], quanta: Sequence[Run], ms: float, forward_ms: float | None
    ) -> None:
        """Observes one iteration.

        Args:
            forward: The forward with the requests' rows and its sampler, if any.
            quanta: What ran after it.
            ms: Milliseconds of the whole iteration.
            forward_ms: Milliseconds of `forward`; None if it was not timed separately.
        """
        if forward_ms is None:
            self._observe_together([*forward, *quanta], ms)
        else:
            self._observe_together(forward, forward_ms)
            self._observe_together(quanta, ms - forward_ms)

    def _observe_together(self, runs: Sequence[Run], ms: float) -> None:
        """Splits the time of calls timed together in proportion to their predictions; ignores ms <= 0 (coarse clock).

        A key that ran more than once counts as one observation.
        """
        if not runs or ms <= 0:
            return
        ratio = ms / sum(self.predict(*run) for run in runs)
        for key, rows in dict.fromkeys(runs):
            self.observe(key, ratio * self.predict(key, rows), rows)

    def predict(self, key: Key, rows: int) -> float:
        """Predicted milliseconds of a key; `rows` only matters for unknown keys.

        More rows of a function never take less time, and fixed costs make time grow more slowly than rows. The guess
        for an unknown key is therefore the time of the next larger known one, or else the largest scaled by rows.
        """
        entry = self._table.get(key)
        if entry is not None:
            return entry.ms
        known = [e for (function, _), e in self._table.items() if function == key[0]]
        if not known:
            return rows * MS_PER_ROW
        larger = [e for e in known if e.rows >= rows]
        if larger:
            return min(larger, key=lambda e: (e.rows, e.ms)).ms
        largest = max(known, key=lambda e: (e.rows, e.ms))
        return largest.ms * rows / largest.rows

    def late(self, key: Key, rows: int) -> float:
        """Milliseconds by which one run of the key in a hundred exceeds the prediction."""
        entry = self._table.get(key)
        return entry.ms * entry.late if entry is not None else FIRST_ERROR * self.predict(key, rows)
