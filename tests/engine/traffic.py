"""An engine for crowds, small and quick, with buckets of several sizes, and random work to feed it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from loquetier_jax.config import Bucket
from loquetier_jax.engine import Engine
from loquetier_jax.sampling_params import SamplingParams
from loquetier_jax.serve.frontend import RequestHandle
from tests.engine.engines import SERVE, add_random_adapter, greedy, kindred_prompt

BUCKETS = (
    Bucket(prefill=16, chunks=1, decode=8),
    Bucket(**SERVE),
    Bucket(prefill=96, chunks=6, decode=16),
    Bucket(**SERVE, score_packs=1, score_tokens=128),
    Bucket(**SERVE, packs=1, pack_tokens=64),
    Bucket(packs=2, pack_tokens=64),
)
RANKS = {"r4": 4, "r8": 8, "r16": 16, "r24": 24, "r32": 32, "r12": 12}
"""Adapters of a busy engine: 8 pages in all."""


def busy_engine(make_engine: Callable[..., Engine], **changes: Any) -> Engine:
    """An engine with buckets of several sizes; too few pages for all of RANKS beside jobs."""
    return make_engine(**({"buckets": BUCKETS} | changes))


def add_adapters(engine: Engine) -> None:
    for seed, (name, r) in enumerate(RANKS.items(), 1):
        add_random_adapter(engine, name, seed, r)


@dataclass
class Work:
    """One request: what it asks, after how many steps it is cancelled (None: never), and what it became."""

    prompt: list[int]
    adapter: str | None
    params: SamplingParams
    cancel_after: int | None = None
    submitted: RequestHandle | None = None
    age: int = 0

    @property
    def tokens(self) -> list[int]:
        return self.submitted.output().outputs[0].token_ids


def random_work(rng: np.random.Generator, cancelled: float) -> Work:
    """A greedy request; one in five wants log-probs: another sampler, which changes nothing."""
    params = greedy(int(rng.integers(1, 25)), logprobs=2 if rng.random() < 0.2 else None)
    return Work(
        prompt=kindred_prompt(rng, int(rng.choice([rng.integers(1, 20), rng.integers(20, 100)]))),
        adapter=str(rng.choice(list(RANKS))) if rng.random() < 0.8 else None,
        params=params,
        cancel_after=int(rng.integers(0, 15)) if rng.random() < cancelled else None,
    )


def run_crowd(engine: Engine, work: list[Work], rng: np.random.Generator, rate: int = 3) -> None:
    """Submits the work, up to `rate` - 1 requests a step, cancels what is to be cancelled, drives until all is done."""
    waiting, live = list(work), []
    while waiting or live:
        for _ in range(min(len(waiting), int(rng.integers(0, rate)))):
            one = waiting.pop(0)
            one.submitted = engine.submit(one.prompt, one.adapter, one.params)
            live.append(one)
        for one in live:
            if one.age == one.cancel_after:
                engine.cancel(one.submitted.request_id)
            one.age += 1
        engine.step()
        live = [one for one in live if not one.submitted.finished]
