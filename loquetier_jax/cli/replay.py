"""Replays a workload: submits requests when they are due, while jobs train, until all have finished."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loquetier_jax.cli.options import BASE
from loquetier_jax.cli.workload import Arrival
from loquetier_jax.errors import LoquetierError

if TYPE_CHECKING:
    from loquetier_jax.engine import Engine
    from loquetier_jax.serve.frontend import RequestHandle

IDLE_S = 0.002  # sleep while there is no work


@dataclass
class Served:
    """A request of the replay.

    Attributes:
        arrival: The request in the workload.
        due: When it is due, in seconds on the engine's clock.
        submitted: Its handle; None if it was refused.
        error: Why it was refused, or None.
    """

    arrival: Arrival
    due: float
    submitted: "RequestHandle | None" = None
    error: str | None = None


def made_up_prompt(arrival: Arrival, vocab_size: int, index: int, seed: int) -> list[int]:
    """Random token ids of the arrival's input length, determined by (seed, index)."""
    rng = np.random.default_rng([seed, index])
    return rng.integers(1, vocab_size, arrival.input_length).tolist()


def replay(
    engine: "Engine",
    arrivals: Sequence[Arrival],
    *,
    sampling: dict[str, Any] | None = None,
    seed: int = 0,
    on_step: Callable[[list[Served]], None] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[Served]:
    """Replays a workload in real time while the engine's jobs train.

    Latencies are measured from when a request was due, not from when it was submitted.

    Args:
        engine: With every adapter loaded; its loop must not run in its own thread.
        arrivals: In order of time.
        sampling: Fields of SamplingParams for every request, in addition to the lengths.
        seed: Seed of random prompts.
        on_step: Called after each iteration with all requests so far.
        stopped: Called before each iteration; returns whether to stop the replay.
    """
    clock = engine.loop.clock
    start, served, live = clock(), [], []
    while not stopped() and (len(served) < len(arrivals) or live):
        while len(served) < len(arrivals) and start + arrivals[len(served)].at <= clock():
            one = _submit(engine, arrivals[len(served)], start, len(served), sampling or {}, seed)
            served.append(one)
            live += [one] if one.submitted else []
        if not engine.step():
            time.sleep(IDLE_S)
        live = [one for one in live if not one.submitted.finished]
        if on_step is not None:
            on_step(served)
    return served


def _submit(
    engine: "Engine", arrival: Arrival, start: float, index: int, sampling: dict[str, Any], seed: int
) -> Served:
    from loquetier_jax.sampling_params import SamplingParams

    made_up = arrival.prompt is None
    prompt = made_up_prompt(arrival, engine.spec.vocab_size, index, seed) if made_up else arrival.prompt
    one = Served(arrival, start + arrival.at)
    try:
        params = SamplingParams(**{"max_tokens": arrival.output_length, "ignore_eos": made_up} | sampling)
        one.submitted = engine.submit(prompt, None if arrival.adapter == BASE else arrival.adapter, params)
    except LoquetierError as error:  # a refused request does not end the replay; it is reported as failed
        one.error = str(error)
        return one
    for request in one.submitted.requests:
        request.metrics.arrival_time = one.due
    return one
