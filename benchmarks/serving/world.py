"""The engine that all serving benchmarks share: the shipped preset, 8B shapes, 32 adapters of rank 16."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.unified.smoke import llama_8b, load_adapters, tiny
from loquetier_jax import Engine, SamplingParams
from loquetier_jax.models.load import init_random
from loquetier_jax.presets import engine_config

ADAPTERS = 32
MAX_PROMPT_ID = 127_000  # as in the peer's script: no special tokens


@dataclass
class World:
    """What is measured.

    Attributes:
        engine: Ready to serve, with `adapters` loaded and resident.
        adapters: Names.
        small: Whether this is the small model for a CPU, where figures mean nothing.
        rng: Of the prompts.
    """

    engine: Engine
    adapters: list[str]
    small: bool
    rng: np.random.Generator

    def prompts(self, count: int, tokens: int) -> list[list[int]]:
        """Random token ids."""
        limit = min(MAX_PROMPT_ID, self.engine.spec.vocab_size)
        return self.rng.integers(10, limit, (count, tokens)).tolist()

    def names(self, count: int, distinct: int) -> list[str | None]:
        """The adapter of each of `count` requests: `distinct` of them in turn, or the base for 0."""
        return [self.adapters[i % distinct] if distinct else None for i in range(count)]

    def seconds(self, prompts: Sequence[Sequence[int]], names: Sequence[str | None], tokens: int) -> float:
        """Seconds until all of these requests have `tokens` greedy tokens each."""
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        started = time.perf_counter()
        outputs = self.engine.generate(prompts, names, params)
        seconds = time.perf_counter() - started
        short = [o.request_id for o in outputs if len(o.outputs[0].token_ids) != tokens]
        if short:
            raise RuntimeError(f"requests {short}: got fewer than {tokens} tokens")
        return seconds


def make_world(small: bool, preset: str) -> World:
    """A preset of configs/engine/, or a file, at Llama-3.1-8B shapes; `small`: with a tiny model."""
    spec, cfg = tiny() if small else llama_8b(), engine_config(preset)
    params = jax.block_until_ready(init_random(spec, jax.random.key(0), jnp.dtype(cfg.dtype)))
    started = time.perf_counter()
    engine = Engine(spec, params, cfg)
    print(f"engine ready after {time.perf_counter() - started:.1f} s", flush=True)
    count = 4 if small else ADAPTERS
    return World(engine, load_adapters(engine, count), small, np.random.default_rng(1))
