"""What the tests of the invariants look at: bits of arrays, numbers of requests and jobs, XLA compilations."""

import contextlib
import gc
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from loquetier_jax.adapters.lora import LoraConfig
from loquetier_jax.config import Bucket
from loquetier_jax.engine import Engine
from loquetier_jax.serve.frontend import RequestHandle
from loquetier_jax.serve.output import RequestOutput
from loquetier_jax.train.config import TrainConfig
from loquetier_jax.train.manager import JobHandle
from tests.engine.engines import PACK, SERVE, greedy, random_prompt

PAIR = Bucket(**SERVE, packs=2, pack_tokens=PACK)
"""Two training packs, of two jobs if need be, beside every kind of inference row."""

LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
"""Of every job here: the shape of `add_random_adapter(..., r=8)` too, so that all share compiled functions."""

Numbers = list[tuple[tuple[int, ...], bytes]]


def bits(tree: Any) -> list[bytes]:
    """The bytes of every array of a tree, in order."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def numbers_of(outputs: Sequence[RequestOutput]) -> Numbers:
    """Tokens of each request, and the bits of the log-probs that came with them."""
    found = []
    for output in outputs:
        completion = output.outputs[0]
        rows = zip(completion.logprobs, completion.token_ids, strict=True)
        logps = np.array([entry[token].logprob for entry, token in rows], np.float32)
        found.append((tuple(completion.token_ids), logps.tobytes()))
    return found


def prompts(seed: int, *lengths: int) -> list[list[int]]:
    """Random prompts of these lengths."""
    rng = np.random.default_rng(seed)
    return [random_prompt(rng, n) for n in lengths]


def serve(engine: Engine, adapter: str | None, seed: int = 0, max_tokens: int = 12) -> Numbers:
    """Numbers of three greedy requests of an adapter: within a block, in one chunk, in several chunks."""
    params = greedy(max_tokens, logprobs=0)
    return numbers_of(engine.generate(prompts(seed, 7, 33, 75), adapter, params))


def finish(engine: Engine, submitted: Sequence[RequestHandle]) -> Numbers:
    """Drives the engine until these have ended; their numbers."""
    engine.wait(lambda: all(s.finished for s in submitted))
    return numbers_of([s.output() for s in submitted])


def train_config(**changes: Any) -> TrainConfig:
    """A few quick steps of two or three packs each, with weight decay."""
    fields: dict[str, Any] = {
        "max_steps": 6,
        "learning_rate": 5e-3,
        "weight_decay": 0.1,
        "pack_tokens": PACK,
        "per_device_train_batch_size": 4,
    }
    return TrainConfig(**(fields | changes))


def quick(**changes: Any) -> TrainConfig:
    """Three small steps."""
    return train_config(**({"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-3} | changes))


def curve(job: JobHandle) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step."""
    return [(line["loss"], line["grad_norm"]) for line in job.metrics if "loss" in line]


def trained(job: JobHandle) -> dict[str, Any]:
    """All that a job has learnt: its curve, and the bits of its masters and optimizer state."""
    device_job = job.device_job
    return {"curve": curve(job), "master": bits(device_job.master), "opt_state": bits(device_job.opt_state)}


def owners(engine: Engine) -> dict[str, int]:
    """What is taken on the device, by kind; all zeros when nobody is there."""
    serving, training = engine.loop.serving, engine.loop.training
    engine.check_integrity()
    pool = engine.adapters.pool
    return {
        "KV pages": serving.kv.num_pages - serving.kv.num_free,
        "slots": serving.slots.size - serving.slots.num_free,
        "train pages": training.grad_pool.size - training.grad_pool.num_free,
        "adapter pages": pool.size - pool.num_free,
    }


def state_of(engine: Engine) -> dict[str, Any]:
    """Everything on the host that a refusal might touch."""
    serving, training = engine.loop.serving, engine.loop.training
    versions = [(v.id, v.name, v.pages, v.holds, v.in_flight, v.last_epoch) for v in engine.adapters.versions()]
    return {
        "waiting": list(serving.waiting),
        "running": {r.id: (r.slot, tuple(r.kv_pages), r.num_dispatched) for r in serving.running.values()},
        "listeners": list(serving.listeners),
        "versions": versions,
        "names": engine.adapters.names(),
        "taken": owners(engine),
        "jobs": [(name, job.status, job.step) for name, job in engine.jobs.items()],
        "device_jobs": list(training.device_jobs),
        "scoring": engine.loop.scoring.views(),
        "seeds": engine.requests.rng.bit_generator.state["state"],
    }


def settle(engine: Engine) -> None:
    """Runs until nothing is left to do, and reads it."""
    while engine.step() or engine.compiler.busy or engine.job_manager.saver.busy:
        pass
    engine.drain()
    gc.collect()


class _Names(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text.startswith("Compiling "):
            self.found.append(text.split(" ")[1])


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Names of what XLA compiles meanwhile (or fetches from its persistent cache), by jax's compilation log."""
    handler, logger = _Names(), logging.getLogger("jax._src.interpreters.pxla")
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield handler.found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
