"""The world of most tests of the engine: a tiny model, few small buckets, and the prompts and data to feed them."""

import functools
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from loquetier_jax.config import Bucket, EngineConfig
from loquetier_jax.engine import Engine
from loquetier_jax.models.load import init_random
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.sampling_params import SamplingParams
from loquetier_jax.train.data import Dataset, make_sample
from tests.step.cases import random_adapter, tiny_spec
from tests.worlds import shared_functions

SPEC = tiny_spec(num_hidden_layers=2, intermediate_size=96, sliding_window=(None, 24))
"""Two layers, one with a sliding window.

Not narrower than 64: XLA on a CPU multiplies 64 x 32 matrices by another routine than larger ones, so a job's bits
would depend on the bucket.
"""

PACK = 64
SERVE = {"prefill": 48, "chunks": 3, "decode": 16}
BUCKETS = (
    Bucket(**SERVE),
    Bucket(**SERVE, score_packs=1, score_tokens=2 * PACK),
    Bucket(**SERVE, packs=1, pack_tokens=PACK),
    Bucket(packs=2, pack_tokens=PACK),
)
"""Every kind of step: serving alone, with score rows, with a training pack, two packs alone."""


def engine_config(cache: str, **changes: Any) -> EngineConfig:
    """A small config over BUCKETS; `cache` is the shared folder of XLA programs."""
    fields: dict[str, Any] = {
        "max_model_len": 128,
        "max_num_seqs": 16,
        "max_adapters": 9,
        "max_lora_rank": 32,
        "train_pages": 5,
        "logit_chunk": 64,
        "buckets": BUCKETS,
        "compilation_cache_dir": cache,
    }
    return EngineConfig(**(fields | changes))


@functools.cache
def base_params(spec: DecoderSpec, seed: int = 0) -> Any:
    """Random f32 parameters; engines never change them, so all may share them."""
    return init_random(spec, jax.random.key(seed), jnp.float32)


def build_engine(
    cache: str, spec: DecoderSpec | None = None, params: Any = None, *, share: bool = True, **changes: Any
) -> Engine:
    """An engine over `SPEC` unless told otherwise.

    Args:
        cache: The fixture `compilation_cache_dir`.
        spec, params: The base; None: SPEC, with random parameters of seed 0.
        share: Whether it shares compiled functions; False where a test patches the step.
        **changes: `tokenizer`, `policy` and `name` of Engine; every other one is a field of EngineConfig.
    """
    spec = spec or SPEC
    own = {key: changes.pop(key) for key in ("tokenizer", "policy", "name") if key in changes}
    cfg = engine_config(cache, **changes)
    params = base_params(spec) if params is None else params
    with shared_functions() if share else nullcontext():
        return Engine(spec, params, cfg, **own)


def reset(engine: Engine) -> None:
    """Ends every request and job and forgets every adapter and prefix: the next test finds an empty engine."""
    for job in engine.jobs.values():
        if job.status in ("queued", "running", "paused"):
            job.cancel()
    serving = engine.loop.serving
    for request in (*serving.waiting.values(), *serving.running.values()):
        engine.cancel(request.request_id)
    while engine.step() or engine.job_manager.saver.wait():
        pass
    engine.drain()
    for name in engine.adapters.names():
        engine.unload_adapter(name)
    engine.jobs.clear()
    engine.reset_prefix_cache()
    engine.check_integrity()


def random_prompt(rng: np.random.Generator, length: int, vocab: int = 272) -> list[int]:
    """Token ids beyond the special ones at the start of the vocabulary."""
    return rng.integers(3, vocab, length).tolist()


def kindred_prompt(rng: np.random.Generator, length: int, families: int = 2) -> list[int]:
    """A prompt that begins like others, for a random part of its length: the prefix cache holds it now and then.

    Takes from `rng` what `random_prompt` takes.
    """
    own = random_prompt(rng, length)
    chance = np.random.default_rng(own)
    beginning = random_prompt(np.random.default_rng(int(chance.integers(families))), 128)
    shared = int(chance.integers(length + 1))
    return beginning[:shared] + own[shared:]


def random_data(seed: int, count: int = 20, low: int = 5, high: int = 40, vocab: int = 272) -> Dataset:
    """`count` samples of low to high tokens, of which about three quarters are learnt."""
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        ids = random_prompt(rng, int(rng.integers(low, high + 1)), vocab)
        learn = rng.random(len(ids)) < 0.75
        learn[-1] = True
        samples.append(make_sample(ids, learn.tolist()))
    return Dataset(f"random-{seed}", tuple(samples))


def add_random_adapter(engine: Engine, name: str, seed: int, r: int = 8, **config: Any) -> None:
    """A random adapter whose B is not zero, served under `name` (see tests/step/cases.py)."""
    shape, weights = random_adapter(engine.spec, seed, r, **config)
    engine.add_adapter(name, weights, shape)


def greedy(max_tokens: int = 10, **changes: Any) -> SamplingParams:
    """Greedy sampling to the full length."""
    return SamplingParams(**({"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True} | changes))
