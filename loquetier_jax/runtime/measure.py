"""Measures compiled functions at warm-up, on rows like real ones, and teaches the latency model."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from loquetier_jax.batch.pack import StepItems
from loquetier_jax.batch.rows import empty_sample, ravel
from loquetier_jax.config import BLOCK, Bucket, EngineConfig
from loquetier_jax.runtime.reads import reads_of
from loquetier_jax.runtime.rehearsal import decode_rows, full_step, harmless, prompt_chunk
from loquetier_jax.sampling_params import Level
from loquetier_jax.schedule.latency import FORWARD, LatencyModel, sampler_run
from loquetier_jax.step.compiled import StepFunctions
from loquetier_jax.step.state import DeviceState

REPEATS = 3
ENOUGH_MS = 100.0
DEEP = 16384  # longest context in tokens that warm-up measures


class Measurer:
    """Runs compiled functions of an idle engine. Writes only the trash page and the trash slot."""

    def __init__(self, functions: StepFunctions, state: DeviceState, cfg: EngineConfig, latency: LatencyModel) -> None:
        self._functions, self._state, self._cfg, self._latency = functions, state, cfg, latency

    def attention(self, buckets: list[Bucket]) -> None:
        """Measures what attention adds as contexts grow, on the largest buckets with decode and with prompt rows."""
        whole = [b for b in buckets if not b.context]
        decode = max((b for b in whole if b.decode), key=lambda b: (b.decode, -b.rows), default=None)
        prefill = max((b for b in whole if b.prefill), key=lambda b: (b.prefill, -b.rows), default=None)
        kv_token_ms = self._decode_slope(decode) if decode else 0.0
        self._latency.seed_attention(kv_token_ms, self._prefill_slope(prefill) if prefill else 0.0)

    def forward(self, bucket: Bucket) -> None:
        """Measures a forward without train rows, full."""
        items = full_step(bucket, self._cfg)
        times = self._forward_times(bucket, items)
        self._latency.seed((FORWARD, bucket.name), times, bucket.rows, reads_of(items))

    def sampler(self, rows: int, level: Level) -> None:
        """Measures a sampler, on rows of zeros."""
        run, cfg = self._functions.sampler(rows, level), self._cfg
        flat = jax.device_put(ravel(empty_sample(rows, cfg)))
        x = jax.device_put(np.zeros((rows, self._functions.spec.hidden_size), jnp.dtype(cfg.dtype)))
        state = self._state
        times = _times(lambda: (state.sample(run, x, flat), state.slots))
        self._latency.seed(sampler_run(rows, level).key, times, rows)

    def _decode_slope(self, bucket: Bucket) -> float:
        """Milliseconds per KV token."""
        short, long = BLOCK, min(self._cfg.max_model_len, DEEP)
        steps = [StepItems(decode=decode_rows(self._cfg, bucket.decode, context)) for context in (short, long)]
        return self._slope(bucket, steps, bucket.decode * (long - short))

    def _prefill_slope(self, bucket: Bucket) -> float:
        """Milliseconds per (row, key) pair."""
        longest = min(self._cfg.max_model_len - 1, DEEP)
        tokens = min(bucket.prefill, longest // 2) // BLOCK * BLOCK
        deep = longest - tokens
        steps = [StepItems(prefill=[prompt_chunk(self._cfg, 0, start, tokens)]) for start in (0, deep)]
        return self._slope(bucket, steps, tokens * deep)

    def _slope(self, bucket: Bucket, steps: list[StepItems], more: int) -> float:
        """Milliseconds per unit by which the second step takes longer than the first; 0 if there are none."""
        if more <= 0:
            return 0.0
        near, far = (statistics.median(self._forward_times(bucket, step)) for step in steps)
        return max(0.0, far - near) / more

    def _forward_times(self, bucket: Bucket, items: StepItems) -> list[float]:
        run, state = self._functions.forward(bucket), self._state
        flat = jax.device_put(ravel(harmless(items, bucket, self._cfg)))
        return _times(lambda: (state.run_forward(run, flat), state.kv))


def _times(call: Callable[[], Any]) -> list[float]:
    """Milliseconds until the results of each call are ready, excluding the first on a GPU, where it loads code.

    At most REPEATS; no more once they have taken ENOUGH_MS in all, because long runs vary little.
    """
    if jax.default_backend() != "cpu":
        jax.block_until_ready(call())
    times: list[float] = []
    while len(times) < REPEATS and sum(times) < ENOUGH_MS:
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(1e3 * (time.perf_counter() - start))
    return times
