"""32 requests that decode while a prompt of 100,000 tokens is computed: how much slower their tokens come."""

import numpy as np

from benchmarks.results import record
from benchmarks.serving.world import World
from loquetier_jax import SamplingParams

ROWS, OUTPUT = 32, 512


def run(world: World) -> list[dict]:
    """long_prompt/100000/{alone,beside}: tpot_p99_ms of the 32; ttft_s of the long prompt; bound: twice `alone`."""
    prompt, output = (240, 40) if world.small else (100_000, OUTPUT)
    if prompt + 1 > world.engine.cfg.max_model_len:
        raise RuntimeError(f"max_model_len: got {world.engine.cfg.max_model_len}, expected more than {prompt}")
    alone, _ = tpot_p99_ms(world, output, None)
    beside, ttft = tpot_p99_ms(world, output, prompt)
    case = f"long_prompt/{prompt}"
    return [
        record(f"{case}/alone", "tpot_p99_ms", alone, "ms"),
        record(f"{case}/beside", "tpot_p99_ms", beside, "ms", bound=2 * alone),
        record(f"{case}/beside", "ttft_s", ttft, "s"),
    ]


def tpot_p99_ms(world: World, output: int, prompt: int | None) -> tuple[float, float]:
    """(TPOT p99 of requests that decode, TTFT of a long prompt that arrives once all of them have a token)."""
    engine, rows = world.engine, 4 if world.small else ROWS
    params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
    names, ids = world.names(rows, 4), world.prompts(rows, 40 if world.small else 512)
    handles = [engine.submit(p, name, params) for p, name in zip(ids, names, strict=True)]
    requests = [handle.requests[0] for handle in handles]
    engine.wait(lambda: all(r.metrics.token_times for r in requests))
    long = None
    if prompt is not None:
        one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        long = engine.submit(world.prompts(1, prompt)[0], None, one).requests[0]
    engine.wait(lambda: all(r.finished for r in requests) and (long is None or long.finished))
    return 1e3 * float(np.quantile([r.metrics.tpot for r in requests], 0.99)), long.metrics.ttft if long else 0.0
