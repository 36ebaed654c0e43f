"""A latency table in a file: how long the compiled functions of one model take on one card (configs/latency/)."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from loquetier_jax.config import Bucket, is_number, require
from loquetier_jax.config_file import load_yaml
from loquetier_jax.schedule.latency import BACKWARD, BACKWARD_SLICE, FORWARD, FORWARD_SLICE, OPTIMIZER, LatencyModel
from loquetier_jax.schedule.types import SlicedShape

HEADER = "# Forwards of rows that sample include the greedy sampler behind them.\n"


@dataclass(frozen=True, kw_only=True)
class Timed:
    """`ms` milliseconds of a function at the shape `bucket`."""

    bucket: Bucket
    ms: float

    def __post_init__(self) -> None:
        require(is_number(self.ms) and self.ms > 0, f"ms of {self.bucket.name}", self.ms, "a number > 0")


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """What one card takes for the functions of an engine.

    Attributes:
        device, model: The card, and whose shapes.
        source: Where the figures come from.
        date, commit, versions: Of the measurement.
        slices: Slices of a whole forward or backward.
        forward: Buckets, those of training included, with the sampler behind them where rows sample; where a pass
            begins, with the head of its backward.
        forward_slice, backward_slice: One slice of it, by the shape of the pass; on average over them.
        backward: All slices in one call.
        optimizer_step_ms: Of one job.
    """

    device: str
    model: str
    source: str
    date: str
    commit: str
    versions: dict[str, str] = field(default_factory=dict)
    slices: int
    forward: tuple[Timed, ...]
    forward_slice: tuple[Timed, ...] = ()
    backward_slice: tuple[Timed, ...] = ()
    backward: tuple[Timed, ...] = ()
    optimizer_step_ms: float | None = None

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """All forwards."""
        return tuple(timed.bucket for timed in self.forward)

    @property
    def sliced(self) -> tuple[SlicedShape, ...]:
        """The shapes of passes whose forward runs in slices, too."""
        shapes = [timed.bucket for timed in self.forward_slice]
        return tuple(SlicedShape(packs=b.packs, pack_tokens=b.pack_tokens, slices=self.slices) for b in shapes)

    def latency(self) -> LatencyModel:
        """A model that predicts the table, and assumes the errors of one that has not been used."""
        model = LatencyModel()
        for function in (FORWARD, FORWARD_SLICE, BACKWARD_SLICE, BACKWARD):
            for timed in getattr(self, function):
                model.seed((function, timed.bucket.name), [timed.ms], timed.bucket.rows)
        if self.optimizer_step_ms is not None:
            model.seed((OPTIMIZER, ""), [self.optimizer_step_ms], 1)
        return model

    def dump(self, path: str | Path) -> None:
        """Writes the file."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for function in (FORWARD, FORWARD_SLICE, BACKWARD_SLICE, BACKWARD):
            data[function] = [{"ms": round(t.ms, 3), "bucket": _set_fields(t.bucket)} for t in data[function]]
        if self.optimizer_step_ms is not None:
            data["optimizer_step_ms"] = round(self.optimizer_step_ms, 3)
        with open(path, "w", encoding="utf-8") as file:
            file.write(HEADER)
            yaml.safe_dump(data, file, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)

    @classmethod
    def load(cls, path: str | Path) -> "LatencyTable":
        """Reads such a file.

        Raises:
            ConfigError: no such file, no YAML, unknown or missing keys, or values out of range.
        """
        return load_yaml(cls, path)


def _set_fields(bucket: Bucket) -> dict[str, int | str]:
    """The fields of a bucket that are not at their defaults, and always one that says what it decodes."""
    return {f.name: v for f in dataclasses.fields(bucket) if (v := getattr(bucket, f.name)) != f.default}
