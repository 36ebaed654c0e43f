"""How long each compiled function takes, and by how much that prediction errs: both from measurements."""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from loquetier_jax.config import require

FORWARD = "forward"  # a bucket, whatever it carries
SAMPLER = "sampler"  # behind it, where tokens are drawn
FORWARD_SLICE = "forward_slice"  # some layers of train rows
BACKWARD = "backward"  # all layers of train rows
BACKWARD_SLICE = "backward_slice"  # some layers of train rows
OPTIMIZER = "optimizer_step"  # one job; rows are 1

Key = tuple[str, str]
"""(function, bucket name); the optimizer's has the name of a job, a sampler's is "rows-level"."""
Run = tuple[Key, int]
"""(key, rows of the function) of one call."""


def sampler_run(rows: int, level: str) -> Run:
    """A call of a sampler."""
    return (SAMPLER, f"{rows}-{level}"), rows


MS_PER_ROW = 0.03  # before anything is measured: about an 8-billion-parameter forward on one large GPU
CLIP = 2.0  # one observation counts at most as twice, and at least as half, the mean
WINDOW = 128  # errors remembered per key: the second largest of them is the 99th percentile
FIRST_ERROR = 0.1  # what is assumed before errors have been seen, a share of the prediction
QUANTILE = 0.99


@dataclass(slots=True)
class Entry:
    """What is known of one key.

    Attributes:
        rows: Rows of the function: what unknown keys are scaled by.
        ms: Running mean, milliseconds.
        count: Observations in it.
        errors: By how much the last runs exceeded their predictions, shares of those.
        late: Their 99th percentile, at least 0.
    """

    rows: int
    ms: float
    count: int = 1
    errors: deque[float] = field(default_factory=lambda: deque([FIRST_ERROR], maxlen=WINDOW))
    late: float = FIRST_ERROR

    def note_error(self, ms: float) -> None:
        """Remembers how a run differed from its prediction."""
        self.errors.append(min(ms / self.ms, CLIP) - 1)
        self.late = max(0.0, sorted(self.errors)[math.ceil(QUANTILE * len(self.errors)) - 1])


class LatencyModel:
    """Table of mean milliseconds per key, with a cautious guess for keys that were never measured."""

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
        """Moves the mean towards one measurement: a stall moves it little, a lasting change fully.

        The first run of a function also loads it, many times its own time: the second one replaces it.

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
            forward: What carried the requests, if anything did: the forward, and the sampler behind it.
            quanta: What ran after it.
            ms: Of the whole iteration.
            forward_ms: Of `forward`; None when that cannot be told apart.
        """
        if forward_ms is None:
            self._observe_together([*forward, *quanta], ms)
        else:
            self._observe_together(forward, forward_ms)
            self._observe_together(quanta, ms - forward_ms)

    def _observe_together(self, runs: Sequence[Run], ms: float) -> None:
        """Calls that were timed together each took their predicted share; a time <= 0 (a coarse clock) says nothing.

        A key that ran more than once counts as one observation.
        """
        if not runs or ms <= 0:
            return
        ratio = ms / sum(self.predict(*run) for run in runs)
        for key, rows in dict.fromkeys(runs):
            self.observe(key, ratio * self.predict(key, rows), rows)

    def predict(self, key: Key, rows: int) -> float:
        """Milliseconds of a key; `rows` only matters when it is unknown.

        More rows of one function never take less time, and fixed costs make time grow slower than rows. So
        the guess for an unknown key is the time of the next larger known one, else the largest scaled by
        rows.
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
