"""What each sampler takes beyond the head's matrix product, at 128 rows of a 128,256 vocabulary.

    python -m benchmarks.serving.sampler            # on a GPU; writes results/<device>/sampler.json
    python -m benchmarks.serving.sampler --tiny     # the same code on a CPU, to see that it runs

Device time alone: a sampler runs many times in a loop on the device. Cases: sampler/128/{greedy,greedy_logprobs,plain,
full}; "plain" rows ask for temperature, top_k and top_p, "full" rows for penalties, a bias and alternatives besides.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.results import record, write
from benchmarks.unified.lora_overhead import fresh, timed
from benchmarks.unified.smoke import llama_8b, tiny
from loquetier_jax.batch.rows import SampleRows, empty_sample
from loquetier_jax.models.decoder import final_norm, logits
from loquetier_jax.models.load import init_random
from loquetier_jax.presets import engine_config
from loquetier_jax.sampling_params import LEVELS
from loquetier_jax.step.head import distribution
from loquetier_jax.step.sample import empty_slots, sample
from loquetier_jax.step.state import head_params

BOUND_MS = {"greedy": 0.1, "plain": 0.3, "full": 1.0}


def rows_of(level: str, n: int, cfg: Any) -> SampleRows:
    """`n` rows, each in its slot, that ask for what the level has."""
    rows = empty_sample(n, cfg)
    rows.slots[:] = np.arange(n)
    rows.seed[:] = np.arange(n)
    if level in ("plain", "full"):
        rows.temperature[:], rows.top_k[:], rows.top_p[:] = 0.8, 50, 0.95
    if level == "full":
        rows.repetition_penalty[:], rows.presence_penalty[:], rows.frequency_penalty[:] = 1.1, 0.5, 0.1
        rows.bias_ids[:, 0], rows.bias[:, 0] = 7, 1.0
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small model, for a CPU")
    parser.add_argument("--out", type=Path, help="folder for the result, instead of benchmarks/results")
    args = parser.parse_args()
    spec, cfg = (tiny(), engine_config("cpu")) if args.tiny else (llama_8b(), engine_config("gpu"))
    spec = dataclasses.replace(spec, num_hidden_layers=1, sliding_window=(None,))
    n, steps, repeats = (16, 3, 2) if args.tiny else (128, 50, 5)
    head = head_params(init_random(spec, jax.random.key(0), jnp.dtype(cfg.dtype)))
    x = jax.random.normal(jax.random.key(1), (n, spec.hidden_size)).astype(cfg.dtype)
    slots = empty_slots(cfg.max_num_seqs, spec.vocab_size)

    def loop(step: Callable[[Any, jax.Array], Any]) -> float:
        """Milliseconds of one step, which maps (slots, x) to slots."""

        @jax.jit
        def run(slots: Any, x: jax.Array) -> Any:
            return jax.lax.fori_loop(0, steps, lambda _, slots: step(slots, fresh(x, slots.last_token)), slots)

        return timed(lambda: run(slots, x), steps, repeats)

    def product(slots: Any, x: jax.Array) -> Any:
        z = jax.lax.optimization_barrier(logits(spec, head, final_norm(spec, head, x)))  # all of it
        return slots.replace(last_token=slots.last_token.at[:n].add(z[:, 0].astype(jnp.int32)))

    def draw(slots: Any, x: jax.Array, rows: SampleRows, level: str) -> Any:
        slots, out = sample(distribution(spec, head, x), rows, slots, level=level, max_logprobs=cfg.max_logprobs)
        spared = sum(jnp.sum(value) for name, value in out.items() if name != "tokens")  # nothing may be compiled out
        return slots.replace(last_token=slots.last_token + (0 * spared).astype(jnp.int32))

    base = loop(product)
    records = [record(f"sampler/{n}/head", "ms", base, "ms")]
    for level in LEVELS:
        ms = loop(functools.partial(draw, rows=jax.tree.map(jnp.asarray, rows_of(level, n, cfg)), level=level)) - base
        bound = {"bound": BOUND_MS[level]} if level in BOUND_MS else {}
        records.append(record(f"sampler/{n}/{level}", "ms", ms, "ms", **bound))
    for r in records:
        print(f"{r['case']:32} {r['value']:8.4f} ms", r.get("bound", ""))
    print(write("sampler", {"vocab_size": spec.vocab_size, "rows": n}, records, folder=args.out))


if __name__ == "__main__":
    main()
