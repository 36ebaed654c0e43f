"""Workloads: requests with arrival times, read from a file or generated. Imports no jax."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from loquetier_jax.cli.prompt_line import prompt_of
from loquetier_jax.config import is_int, is_number, require
from loquetier_jax.config_file import from_dict
from loquetier_jax.errors import ConfigError, DataError
from loquetier_jax.json_records import parse_json

Assign = Literal["round-robin", "uniform", "zipf"]
ASSIGN = ("round-robin", "uniform", "zipf")
LINE_KEYS = {"timestamp", "input_length", "output_length", "hash_ids", "prompt", "messages", "adapter"}


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """One request of a workload.

    Attributes:
        at: Seconds from the start of the replay.
        input_length: Tokens of a random prompt; ignored if `prompt` is given.
        output_length: Tokens to generate: exact for a random prompt, a maximum otherwise.
        prompt: Text, token ids or chat messages; None for a random prompt.
        adapter: A name or "base"; None lets the workload assign one.
    """

    at: float
    input_length: int
    output_length: int
    prompt: Any = None
    adapter: str | None = None


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The source of requests and how they are assigned to adapters; the keys of a configs/workloads/ file.

    Attributes:
        source: A .jsonl file (Mooncake's {"timestamp" in ms, "input_length", "output_length"}, or "prompt" or
            "messages" instead of the input length), any other file (one arrival time in seconds per line), or None
            for the generator.
        rate: Requests per second of the generator; 0 makes all arrive at once.
        burstiness: Shape of the gamma-distributed gaps, as in `vllm bench serve`: 1 is a Poisson process,
            below 1 is burstier, above 1 more regular.
        num_requests: Number of requests; None means 100 from the generator, or all of a file.
        input_len, output_len: [min, max] tokens, drawn uniformly if not given by the source.
        assign: How requests without an adapter are distributed over the adapters: "round-robin", "uniform" or
            "zipf".
        zipf: Exponent of "zipf".
        time_scale: Multiplies all arrival times; 0.5 replays twice as fast.
        seed: Seed of everything random.
    """

    source: str | None = None
    rate: float = 4.0
    burstiness: float = 1.0
    num_requests: int | None = None
    input_len: tuple[int, ...] = (16, 64)
    output_len: tuple[int, ...] = (16, 64)
    assign: Assign = "round-robin"
    zipf: float = 1.0
    time_scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rate", "burstiness", "zipf", "time_scale"):
            value = getattr(self, name)
            ok = is_number(value) and 0 <= value < math.inf and (value > 0 or name != "burstiness")
            require(ok, name, value, "a finite number > 0" if name == "burstiness" else "a finite number >= 0")
        count = self.num_requests
        require(count is None or (is_int(count) and count > 0), "num_requests", count, "an integer > 0")
        require(is_int(self.seed) and self.seed >= 0, "seed", self.seed, "an integer >= 0")
        for name in ("input_len", "output_len"):
            span = getattr(self, name)
            pair = isinstance(span, tuple) and len(span) == 2 and all(is_int(n) for n in span)
            ok = pair and 1 <= span[0] <= span[1]
            require(ok, name, span, "[least, most], integers >= 1")
        require(self.assign in ASSIGN, "assign", self.assign, f"one of {ASSIGN}")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Workload":
        """Builds a workload; raises ConfigError for an unknown key or a value that the class refuses."""
        return from_dict(cls, data, "workload ")


def arrivals(workload: Workload, adapters: Sequence[str]) -> list[Arrival]:
    """All requests of a workload, in order of arrival, each with its adapter.

    Args:
        workload: The workload; equal workloads give equal requests.
        adapters: Names to assign, at least one; may include "base".

    Raises:
        DataError: a malformed line in the file; names it.
        ConfigError: a line names an adapter that is not in `adapters`.
    """
    rng = np.random.default_rng(workload.seed)
    if workload.source is None:
        found = list(_generate(workload, rng))
    else:
        found = list(_read(workload, Path(workload.source), rng))
    found = sorted(found, key=lambda a: a.at)[: workload.num_requests]
    names = _names(workload, adapters, len(found), rng)
    found = [
        replace(a, at=a.at * workload.time_scale, adapter=a.adapter or n) for a, n in zip(found, names, strict=True)
    ]
    unknown = sorted({a.adapter for a in found} - {*adapters, "base"})
    if unknown:
        raise ConfigError(f"{workload.source}: got adapters {unknown}, expected some of {sorted(adapters)}")
    return found


def _generate(workload: Workload, rng: np.random.Generator) -> Iterator[Arrival]:
    at = 0.0
    for _ in range(workload.num_requests or 100):
        yield Arrival(at=at, **_lengths(workload, rng))
        if workload.rate:
            at += rng.gamma(workload.burstiness, 1 / (workload.rate * workload.burstiness))


def _lengths(workload: Workload, rng: np.random.Generator) -> dict[str, int]:
    spans = {"input_length": workload.input_len, "output_length": workload.output_len}
    return {name: int(rng.integers(low, high + 1)) for name, (low, high) in spans.items()}


def _read(workload: Workload, path: Path, rng: np.random.Generator) -> Iterator[Arrival]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from error
    read = _trace_line if path.suffix == ".jsonl" else _second
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield read(line, f"{path}:{number}", _lengths(workload, rng))


def _second(line: str, where: str, lengths: dict[str, int]) -> Arrival:
    try:
        at = float(line)
    except ValueError:
        at = -1.0
    if not 0 <= at < float("inf"):
        raise DataError(f"{where}: got {line!r:.60}, expected a number of seconds >= 0")
    return Arrival(at=at, **lengths)


def _trace_line(line: str, where: str, lengths: dict[str, int]) -> Arrival:
    data = parse_json(line, where, DataError)
    if not isinstance(data, dict) or not data.keys() <= LINE_KEYS:
        raise DataError(f"{where}: got {line!r:.80}, expected an object with keys of {sorted(LINE_KEYS)}")
    for key, least in (("timestamp", 0), ("input_length", 1), ("output_length", 1)):
        value = data.get(key, least)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value < float("inf"):
            raise DataError(f"{where}: {key}: got {value!r}, expected a number >= {least}")
    adapter = data.get("adapter")
    if adapter is not None and not isinstance(adapter, str):
        raise DataError(f"{where}: adapter: got {adapter!r:.60}, expected a name")
    return Arrival(
        at=data.get("timestamp", 0) / 1e3,
        input_length=int(data.get("input_length", lengths["input_length"])),
        output_length=int(data.get("output_length", lengths["output_length"])),
        prompt=prompt_of(data, where, DataError),
        adapter=adapter,
    )


def _names(workload: Workload, adapters: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """One adapter per request."""
    if workload.assign == "round-robin":
        return [adapters[i % len(adapters)] for i in range(count)]
    weights = np.ones(len(adapters))
    if workload.assign == "zipf":
        weights = np.arange(1, len(adapters) + 1, dtype=float) ** -workload.zipf
    return [adapters[i] for i in rng.choice(len(adapters), count, p=weights / weights.sum())]
