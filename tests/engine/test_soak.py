"""Hundreds of steps of everything at once: nothing compiles after warm-up, and the books are right at every step."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from loquetier_jax.adapters.lora import LoraConfig
from loquetier_jax.engine import Engine
from loquetier_jax.errors import AdapterError, JobError, LoquetierError, RequestError
from loquetier_jax.sampling_params import SamplingParams
from loquetier_jax.serve.frontend import RequestHandle
from loquetier_jax.serve.output import RequestOutput
from loquetier_jax.train.config import TrainConfig
from loquetier_jax.train.manager import JobHandle
from tests.engine.engines import kindred_prompt, random_data, random_prompt
from tests.engine.traffic import RANKS, busy_engine
from tests.step.cases import random_adapter

KINDS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"r": 4, "target_modules": "all-linear"}, "adamw"),
    ({"r": 20}, "sgd"),
    ({"r": 8, "lora_dropout": 0.2}, "lion"),
    ({"r": 8}, "adafactor"),
)
"""Jobs: rank, targets and optimizer decide what is compiled; all of them are warmed up."""

SICK = "sick"
"""An adapter of NaN, whose requests end with an error."""


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects what jax says it compiles, in whatever thread, cache hits included."""
    found: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "ompil" in record.getMessage():
                found.append(record.getMessage())

    logger, handler = logging.getLogger("jax"), Collect()
    before, propagate = jax.config.jax_log_compiles, logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    jax.config.update("jax_log_compiles", True)
    try:
        yield found
    finally:
        jax.config.update("jax_log_compiles", before)
        logger.propagate = propagate
        logger.removeHandler(handler)


class Soak:
    """A player that does random things to an engine between its steps."""

    def __init__(self, engine: Engine, seed: int, folder: Path, kinds: Sequence[int]) -> None:
        self.engine, self.rng, self.folder, self.kinds = engine, np.random.default_rng(seed), folder, kinds
        self.steps, self.serial, self.cached, self.errors = 0, 0, 0, 0
        self.done: Counter[str] = Counter()
        self.requests: list[RequestHandle] = []
        self.jobs: list[JobHandle] = []
        self._step = engine.step
        engine.step = self.step

    def step(self) -> bool:
        """What the engine's own waits call, too: the books are checked after every step there is."""
        worked = self._step()
        self.engine.check_integrity()
        self.steps += 1
        return worked

    def name(self) -> str | None:
        return str(self.rng.choice(self.engine.adapters.names())) if self.rng.random() < 0.8 else None

    def play(self) -> None:
        """One step, with something random before it most of the time."""
        chances = {"submit": 0.3, "cancel": 0.04, "finetune": 0.03, "publish": 0.03, "pause": 0.03, "end": 0.008}
        chances |= {"add": 0.01, "load": 0.01, "unload": 0.01, "rename": 0.01, "score": 0.01, "refused": 0.02}
        for action, chance in chances.items():
            if self.rng.random() < chance:
                getattr(self, action)()
                self.done[action] += 1
        self.engine.step()
        for handle in [r for r in self.requests if r.finished]:
            self.requests.remove(handle)
            self.count(handle.output())
        self.jobs = [j for j in self.jobs if j.name in self.engine.loop.training.device_jobs]

    def count(self, output: RequestOutput) -> None:
        """Tokens found in the prefix cache, and errors, which only the sick adapter's requests end with."""
        errors = [o.stop_reason for o in output.outputs if o.finish_reason == "error"]
        assert not errors or (output.adapter == SICK and "not finite" in errors[0]), errors
        self.cached += output.num_cached_tokens
        self.errors += len(errors)

    def params(self) -> SamplingParams:
        rng, kind = self.rng, int(self.rng.integers(4))
        common = {"max_tokens": int(rng.integers(1, 20)), "stop_token_ids": tuple(rng.integers(3, 272, 3).tolist())}
        return SamplingParams(
            **common,
            **(
                {"temperature": 0},
                {"top_k": int(rng.integers(0, 50)), "n": int(rng.integers(1, 3))},
                {"repetition_penalty": 1.2, "logprobs": 2, "seed": int(rng.integers(1000)), "min_tokens": 1},
                {"temperature": 0, "prompt_logprobs": 1},
            )[kind],
        )

    def submit(self) -> None:
        prompt = kindred_prompt(self.rng, int(self.rng.integers(1, 90)))
        self.requests.append(self.engine.submit(prompt, self.name(), self.params()))

    def cancel(self) -> None:
        if self.requests:
            self.engine.cancel(self.requests[int(self.rng.integers(len(self.requests)))].request_id)

    def finetune(self) -> None:
        if len(self.jobs) < 3:
            self.start_job(int(self.rng.choice(self.kinds)), int(self.rng.integers(1, 8)))

    def start_job(self, kind: int, steps: int) -> JobHandle:
        lora, optim = KINDS[kind]
        self.serial += 1
        evaluates = self.serial % 2 == 1
        handle = self.engine.finetune(
            f"job-{self.serial % 6}-{self.serial}",
            random_data(self.serial, count=8),
            eval_data=random_data(1000 + self.serial, count=3) if evaluates else None,
            lora=LoraConfig(**lora),
            train=TrainConfig(
                max_steps=steps,
                optim=optim,
                pack_tokens=64,
                per_device_train_batch_size=4,
                eval_steps=2 if evaluates else 0,
            ),
        )
        self.jobs.append(handle)
        return handle

    def publish(self) -> None:
        for job in self.jobs:
            if job.status == "running" and self.engine.loop.training.device_jobs[job.name].pages:
                job.publish()
                return

    def pause(self) -> None:
        for job in self.jobs:
            if job.status == "paused":
                job.resume()
            elif job.status == "running" and self.rng.random() < 0.5:
                job.pause()

    def end(self) -> None:
        if self.jobs and self.jobs[0].status in ("queued", "running", "paused"):
            self.jobs[0].cancel()

    def add(self) -> None:
        self.put(str(self.rng.choice([*RANKS, SICK])))

    def put(self, name: str) -> None:
        shape, weights = random_adapter(self.engine.spec, self.steps, RANKS.get(name, 8))
        if name == SICK:
            weights = jax.tree.map(lambda a: np.full_like(a, np.nan), weights)
        self.engine.add_adapter(name, weights, shape, replace=True)

    def load(self) -> None:
        path = self.folder / "saved"
        if not path.exists():
            self.engine.save_adapter("r24", path)
        self.engine.load_adapter(f"loaded-{self.rng.integers(4)}", path, replace=True)

    def unload(self) -> None:
        names = [n for n in self.engine.adapters.names() if n.startswith(("loaded", "job", "renamed"))]
        live = self.engine.loop.training.device_jobs
        for name in names[:2]:
            if name not in live:
                self.engine.unload_adapter(name)

    def rename(self) -> None:
        names = [n for n in self.engine.adapters.names() if n.startswith("loaded")]
        if names:
            self.serial += 1
            self.engine.rename_adapter(names[0], f"renamed-{self.serial}")

    def score(self) -> None:
        sequences = [random_prompt(self.rng, int(n)) for n in self.rng.integers(2, 120, 3)]
        assert [len(s) for s in self.engine.log_probs(sequences, self.name())] == [len(s) - 1 for s in sequences]

    def refused(self) -> None:
        for error, call in (
            (AdapterError, lambda: self.engine.submit([5], "nobody")),
            (RequestError, lambda: self.engine.submit([5] * 120, None, SamplingParams(max_tokens=9))),
            (RequestError, lambda: self.engine.submit([5000])),
            (LoquetierError, lambda: self.engine.finetune("x", [{"text": 3}])),
            (AdapterError, lambda: self.engine.finetune("x", random_data(0), lora=LoraConfig(r=64))),
        ):
            with pytest.raises(error):
                call()

    def finish(self) -> None:
        """Lets everything come to its end."""
        for job in self.jobs:
            if job.status == "paused":
                job.resume()
        self.engine.wait(lambda: all(r.finished for r in self.requests))
        self.engine.wait(lambda: not self.engine.loop.training.device_jobs)
        self.engine.drain()


@pytest.mark.slow  # the invariants that it plays through have tests of their own
@pytest.mark.parametrize("steps", [160, 2000])
def test_nothing_compiles_and_the_books_are_right(
    make_engine: Callable[..., Engine], tmp_path: Path, record_property: Callable[[str, object], None], steps: int
):
    engine = busy_engine(make_engine, max_host_adapters=2)
    kinds = range(len(KINDS)) if steps >= 2000 else (0, 3)  # fewer to compile
    player = Soak(engine, 1, tmp_path, kinds)
    for name in (*RANKS, SICK):
        player.put(name)
    for kind in kinds:  # warm-up
        player.start_job(kind, 2)
        player.finish()
    for action in ("add", "load", "score", "submit"):
        getattr(player, action)()
    player.finish()

    player.steps = 0
    player.done.clear()
    with compilations() as compiled:
        while player.steps < steps:
            player.play()
        player.finish()
    assert compiled == []
    record_property("steps", player.steps)
    record_property("actions", dict(player.done))
    assert min(player.done.values()) > steps // 400 and len(player.done) >= (12 if steps >= 2000 else 8), player.done
    record_property("cached tokens, errors", (player.cached, player.errors))
    assert player.cached > (steps // 4 if steps >= 2000 else 0) and player.errors
    statuses = Counter(job.status for job in engine.jobs.values())
    assert statuses["succeeded"] > steps // 400 and not statuses["failed"], statuses
    pools = engine.loop.serving.kv, engine.loop.serving.slots, engine.loop.training.grad_pool
    assert [p.num_free for p in pools] == [pools[0].num_pages, pools[1].size, pools[2].size]
    with pytest.raises(JobError, match="it is"):
        next(iter(engine.jobs.values())).pause()


def test_the_log_shows_a_compilation():
    """The assertion above can fail."""
    with compilations() as compiled:
        jax.jit(lambda x: x * 3 - 1)(np.arange(7))
    assert compiled
