"""What one kind of input is, and the loop that throws mutated ones at it."""

import ctypes
import gc
import os
import random
import resource
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from loquetier_jax.errors import LoquetierError

MOST_GROWTH = 1.05  # of memory, from the first tenth of the inputs to the last
MOST_MESSAGE = 5000  # characters of an error: it shows what came, not all of it


class Kind(Protocol):
    """Inputs of one kind, and what takes them.

    Attributes:
        errors: What its documentation says it raises; a refusal of another type is a failure.
    """

    errors: tuple[type[LoquetierError], ...]

    def attempt(self, rng: random.Random) -> None:
        """Makes one mutated input and gives it to the product; an accepted one is looked at, and taken back.

        Raises:
            LoquetierError: what the product raised.
            AssertionError: it was accepted as something that it is not, or has left something behind.
        """

    def traces(self) -> Any:
        """What has to be the same before and after."""


Build = Callable[[Path], Kind]
"""An empty folder, to write inputs to -> the kind."""


@dataclass
class Outcome:
    """What became of the inputs of one kind.

    Attributes:
        seed: Of the first input; input i is made from (seed, i) alone.
        count: Inputs.
        accepted: Those that were still right, or right in another way.
        refused: The others, by type of error.
        seconds: For all.
        slowest: Seconds for the slowest one.
        rss_first: Bytes of memory after the first tenth.
        rss_last: And after the last.
    """

    seed: int
    count: int
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    slowest: float = 0.0
    rss_first: int = 0
    rss_last: int = 0

    @property
    def growth(self) -> float:
        """Memory after the last input over that after the first tenth."""
        return self.rss_last / self.rss_first


def fuzz(build: Build, folder: Path, count: int, seed: int = 0) -> Outcome:
    """Gives `count` mutated inputs to a kind.

    Raises:
        AssertionError: another error than the documented ones, or a warning, or a message that cannot be printed;
            something left behind: what `Kind.traces` tells of, or an open file of the folder.
    """
    kind, outcome, started = build(folder), Outcome(seed, count), time.perf_counter()
    before = kind.traces()
    for i in range(count):
        begun = time.perf_counter()
        refusal = _attempt(kind, seed, i)
        outcome.slowest = max(outcome.slowest, time.perf_counter() - begun)
        if refusal is None:
            outcome.accepted += 1
        else:
            outcome.refused[refusal] += 1
        traces = kind.traces()
        assert traces == before, f"seed {seed}, input {i}: was {before}, is {traces}"
        if i + 1 == max(1, count // 10):
            outcome.rss_first = _rss()
    outcome.rss_last, outcome.seconds = _rss(), time.perf_counter() - started
    left = _open_files(folder)
    assert not left, f"left open: {left[:3]}"
    return outcome


def _attempt(kind: Kind, seed: int, i: int) -> str | None:
    """The type of the refusal of input i; None where it is accepted."""
    where = f"seed {seed}, input {i}"
    try:
        with warnings.catch_warnings(action="error"):
            kind.attempt(random.Random(f"{seed}/{i}"))
    except kind.errors as error:
        text = str(error)
        printable = text.encode("utf-8", "replace") == text.encode("utf-8", "surrogatepass")  # no half of a pair
        assert printable and 0 < len(text) < MOST_MESSAGE, f"{where}: the message is of no use: {text[:200]!r}"
        return type(error).__name__
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        raise AssertionError(f"{where}: {type(error).__name__}: {str(error)[:500]!r}") from error
    return None


def _rss() -> int:
    """What is in use: collected, and without what the allocator keeps of freed memory, which goes up and down."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _open_files(folder: Path) -> list[str]:
    links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return [path for link in links if link.is_symlink() and (path := os.readlink(link)).startswith(str(folder))]


def listing(folder: Path) -> list[str]:
    """The paths of everything in a folder, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
