"""What a simulation runs: requests and jobs without content."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from loquetier_jax.schedule.types import JobStatus, JobView


@dataclass
class SimRequest:
    """A request of known length; the simulator writes the fields after `adapter`.

    Attributes:
        id, adapter: As in Waiting.
        arrival: Seconds.
        prompt, output: Tokens.
        remaining: Prompt tokens not run yet; None while it waits.
        times: When each output token came.
    """

    id: str
    arrival: float
    prompt: int
    output: int
    adapter: str = ""
    remaining: int | None = None
    times: list[float] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether its last token has been dispatched."""
        return len(self.times) >= self.output

    @property
    def ttft_ms(self) -> float:
        """From its arrival to its first token."""
        return 1e3 * (self.times[0] - self.arrival)

    @property
    def tpot_ms(self) -> float:
        """Mean gap; 0 for a single token."""
        return 1e3 * (self.times[-1] - self.times[0]) / max(len(self.times) - 1, 1)

    @property
    def gaps_ms(self) -> list[float]:
        """Every gap."""
        return [1e3 * (b - a) for a, b in zip(self.times, self.times[1:], strict=False)]


@dataclass
class SimJob:
    """A job that always has data: `accumulate` packs, then an optimizer step; the rest is written by the simulator.

    Attributes:
        name, pack_tokens, group: As in JobView.
        accumulate: Packs of an optimizer step.
        packs, steps: Started so far.
        pending: Packs since the last optimizer step.
        in_pass: Whether packs of it are in the pass in flight.
    """

    name: str
    pack_tokens: int
    accumulate: int = 1
    group: str = ""
    packs: int = 0
    steps: int = 0
    pending: int = 0
    in_pass: bool = False

    def view(self) -> JobView:
        """What the policy sees."""
        due = self.pending == self.accumulate
        status: JobStatus = "in_pass" if self.in_pass else "optimizer" if due else "ready"
        left = self.accumulate - self.pending
        return JobView(name=self.name, status=status, pack_tokens=self.pack_tokens, packs=left, group=self.group)


def poisson(rate: float, count: int, prompt: int, output: int, adapters: int, seed: int) -> Iterator[SimRequest]:
    """`count` requests that arrive independently, `rate` a second, dealt out to `adapters` in turn."""
    times = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count))
    for i, at in enumerate(times.tolist()):
        yield SimRequest(f"r{i}", at, prompt, output, f"a{i % adapters}")
