"""How long each compiled function takes: measured at warm-up, kept true by a running mean."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loquetier_jax.config import require

FORWARD = "forward"  # a bucket, whatever it carries
FORWARD_SLICE = "forward_slice"  # some layers of train rows
BACKWARD = "backward"  # all layers of train rows
BACKWARD_SLICE = "backward_slice"  # some layers of train rows
OPTIMIZER = "optimizer_step"  # one job; rows are 1

Key = tuple[str, str]
"""(function, bucket name); for the optimizer (function, job name)."""

MS_PER_ROW = 0.03  # before anything is measured: about an 8-billion-parameter forward on one large GPU
CLIP = 2.0  # one observation counts at most as twice, and at least as half, the mean


@dataclass(slots=True)
class Entry:
    """Running mean of one key.

    Attributes:
        rows: Rows of the function: what unknown keys are scaled by.
        ms: Mean, milliseconds.
        count: Observations in it.
    """

    rows: int
    ms: float
    count: int = 1


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
        clipped = min(max(ms, entry.ms / CLIP), entry.ms * CLIP)
        entry.ms += max(self.smoothing, 1 / entry.count) * (clipped - entry.ms)

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

    def to_json(self) -> str:
        """The table as JSON text, one entry a line."""
        lines = [
            json.dumps({"function": f, "bucket": b, "rows": e.rows, "ms": e.ms, "count": e.count})
            for (f, b), e in sorted(self._table.items())
        ]
        return "[\n" + ",\n".join(lines) + "\n]\n"

    @classmethod
    def from_json(cls, text: str, smoothing: float = 0.1) -> "LatencyModel":
        """The reverse of `to_json`.

        Raises:
            ConfigError: an entry with missing or unknown keys, or with values out of range.
        """
        model = cls(smoothing)
        fields = {"function", "bucket", "rows", "ms", "count"}
        for i, item in enumerate(json.loads(text)):
            require(
                isinstance(item, dict) and set(item) == fields,
                f"latency[{i}]",
                item,
                f"keys {sorted(fields)}",
            )
            key = (item["function"], item["bucket"])
            model.seed(key, [item["ms"]], item["rows"])
            model._table[key].count = item["count"]
        return model

    def dump(self, path: str | Path) -> None:
        """Writes the table to a file."""
        Path(path).write_text(self.to_json())

    @classmethod
    def load(cls, path: str | Path, smoothing: float = 0.1) -> "LatencyModel":
        """Reads what `dump` wrote."""
        return cls.from_json(Path(path).read_text(), smoothing)
