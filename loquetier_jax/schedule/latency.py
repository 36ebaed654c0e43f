"""Predicts the time of each compiled function, and the error of the prediction, from measurements."""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from loquetier_jax.config import require

FORWARD = "forward"  # a bucket's forward
SAMPLER = "sampler"  # after it, if tokens are sampled
FORWARD_SLICE = "forward_slice"  # some layers of train rows
BACKWARD = "backward"  # all layers of train rows
BACKWARD_SLICE = "backward_slice"  # some layers of train rows
OPTIMIZER = "optimizer_step"  # one job; rows are 1

Key = tuple[str, str]
"""(function, bucket name), or a job's name for the optimizer, or "rows-level" for a sampler."""


class Reads(NamedTuple):
    """What the attention of a forward's inference rows reads; grows with the contexts, at equal rows.

    Attributes:
        kv_tokens: Tokens of the KV cache read by decode rows, summed over the rows.
        pairs: (row, key) pairs of the prompt chunks.
    """

    kv_tokens: int = 0
    pairs: int = 0


NOTHING = Reads()


def chunk_pairs(start: int, tokens: int) -> int:
    """`Reads.pairs` of a chunk of `tokens` rows behind `start` tokens."""
    return tokens * start + tokens * (tokens + 1) // 2


class Run(NamedTuple):
    """One call: its key, the rows of the function, and what the attention reads."""

    key: Key
    rows: int
    reads: Reads = NOTHING


def sampler_run(rows: int, level: str) -> Run:
    """One call of a sampler."""
    return Run((SAMPLER, f"{rows}-{level}"), rows)


MS_PER_ROW = 0.03  # guess before any measurement: about an 8-billion-parameter forward on one large GPU
CLIP = 2.0  # observations are clipped to at most this factor above or below the mean
WINDOW = 128  # errors remembered per key; the second largest is the 99th percentile
FIRST_ERROR = 0.1  # assumed relative error before any was observed
QUANTILE = 0.99
STALE = 1024  # observations of other keys after which a mean is believed less
LEAST_BASE = 0.1  # of a measured time is never attributed to attention


@dataclass(slots=True)
class Entry:
    """Measurements of one key.

    Attributes:
        rows: Rows of the function, for scaling to unknown keys.
        ms: Running mean without attention, milliseconds.
        count: Number of observations.
        seen: The model's number of observations at the latest of them.
        errors: Relative errors of the latest runs: actual / predicted - 1.
        late: Their 99th percentile, at least 0.
    """

    rows: int
    ms: float
    count: int = 1
    seen: int = 0
    errors: deque[float] = field(default_factory=lambda: deque([FIRST_ERROR], maxlen=WINDOW))
    late: float = FIRST_ERROR

    def note_error(self, ratio: float) -> None:
        """Records how long a run took relative to its prediction."""
        self.errors.append(min(ratio, CLIP) - 1)
        self.late = max(0.0, sorted(self.errors)[math.ceil(QUANTILE * len(self.errors)) - 1])


class LatencyModel:
    """Table of mean milliseconds per key, with a conservative guess for keys never measured.

    A forward takes its key's mean and a time proportional to what its attention reads: 512 rows behind 100,000 tokens
    take an H100 five times as long as 512 first ones.
    """

    def __init__(self, smoothing: float = 0.1) -> None:
        """Starts empty; `smoothing` is the weight of a new observation once there are many, in (0, 1]."""
        require(0 < smoothing <= 1, "smoothing", smoothing, "a number in (0, 1]")
        self.smoothing = smoothing
        self._table: dict[Key, Entry] = {}
        self._slopes = (0.0, 0.0)  # milliseconds per Reads.kv_tokens, per Reads.pairs
        self._observations = 0

    def known(self, key: Key) -> bool:
        """Whether the key has been measured."""
        return key in self._table

    def seed(self, key: Key, ms: Sequence[float], rows: int, reads: Reads = NOTHING) -> None:
        """Sets the mean to the median of warm-up measurements, each of a call that read as much as `reads`.

        Raises:
            ConfigError: no measurement, one that is not > 0, or rows < 1.
        """
        require(len(ms) > 0 and all(m > 0 for m in ms), f"latency of {key}", list(ms), "times > 0")
        require(rows >= 1, f"rows of {key}", rows, "an integer >= 1")
        base = self._without_attention(statistics.median(ms), reads)
        self._table[key] = Entry(rows, base, len(ms), self._observations)

    def seed_attention(self, kv_token_ms: float, pair_ms: float) -> None:
        """Sets the milliseconds per KV token that a decode row reads, and per (row, key) pair of a prompt chunk.

        Raises:
            ConfigError: one is < 0 or not finite.
        """
        for name, value in (("kv_token_ms", kv_token_ms), ("pair_ms", pair_ms)):
            require(0 <= value < math.inf, name, value, "a number >= 0")
        self._slopes = (kv_token_ms, pair_ms)

    def attention_ms(self, reads: Reads) -> float:
        """Predicted milliseconds of reading this much."""
        return reads.kv_tokens * self._slopes[0] + reads.pairs * self._slopes[1]

    def observe(self, key: Key, ms: float, rows: int, reads: Reads = NOTHING) -> None:
        """Moves the mean towards one measurement; a single stall has little effect, a lasting change its full effect.

        The first run of a function includes loading it, many times its own duration; a faster second run replaces it,
        as does one of a function that has not run for long.

        Raises:
            ConfigError: ms is not > 0, or rows < 1.
        """
        require(ms > 0, f"latency of {key}", ms, "a time > 0")
        entry = self._table.get(key)
        if entry is None:
            self.seed(key, [ms], rows, reads)
            return
        base = self._without_attention(ms, reads)
        self._observations += 1
        entry.count = 2 if self._is_stale(entry) else entry.count + 1
        entry.seen = self._observations
        if entry.count == 2 and base < entry.ms:
            entry.ms = base
            return
        entry.note_error(ms / (entry.ms + self.attention_ms(reads)))
        clipped = min(max(base, entry.ms / CLIP), entry.ms * CLIP)
        entry.ms += max(self.smoothing, 1 / entry.count) * (clipped - entry.ms)

    def _without_attention(self, ms: float, reads: Reads) -> float:
        return max(ms - self.attention_ms(reads), LEAST_BASE * ms)

    def _is_stale(self, entry: Entry) -> bool:
        return self._observations - entry.seen > STALE

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
        for run in dict.fromkeys(Run(*run) for run in runs):
            self.observe(run.key, ratio * self.predict(*run), run.rows, run.reads)

    def predict(self, key: Key, rows: int, reads: Reads = NOTHING) -> float:
        """Predicted milliseconds of a call; `rows` only matters for unknown keys.

        More rows of a function never take less time, and fixed costs make time grow more slowly than rows. The guess
        for an unknown key is therefore the time of the next larger known one, or else the largest scaled by rows.
        """
        return self._base_ms(key, rows) + self.attention_ms(reads)

    def _base_ms(self, key: Key, rows: int) -> float:
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

    def late(self, key: Key, rows: int, reads: Reads = NOTHING) -> float:
        """Milliseconds by which one such call in a hundred exceeds the prediction; more if it has not run for long."""
        entry = self._table.get(key)
        share = FIRST_ERROR if entry is None else entry.late
        if entry is not None and self._is_stale(entry):
            share = max(share, FIRST_ERROR)
        return share * self.predict(key, rows, reads)
