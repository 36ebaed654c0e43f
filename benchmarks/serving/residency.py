"""Adapters beyond residency: many names on few device pages, against the same arrivals on adapters that all fit.

    python -m benchmarks.serving.residency            # on a GPU; Llama-3.1-8B's shapes, the `gpu` preset
    python -m benchmarks.serving.residency --tiny     # the same code on a CPU, to see that it runs

Cases: residency/cold48 (48 adapters, none touched before, 16 requests a second), residency/1000in64 (1,000 names over
40 folders on 64 pages, Zipf(1.0) at 70 % of capacity, divided by the same arrivals with name mod 48). Beside them, how
long registering takes, and how long the loop's thread was busy with a load.
"""

import argparse
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks.results import record, write
from benchmarks.unified.smoke import llama_8b, tiny
from loquetier_jax import Bucket, Engine, EngineConfig, LoraConfig, SamplingParams
from loquetier_jax.adapters.lora import init_weights, resolve_shape
from loquetier_jax.adapters.peft import CONFIG_FILE, WEIGHTS_FILE, write_peft
from loquetier_jax.cli.replay import Served, made_up_prompt
from loquetier_jax.cli.report import latencies
from loquetier_jax.cli.workload import Arrival, Workload, arrivals
from loquetier_jax.models.load import init_random
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.presets import engine_config


@dataclass(frozen=True)
class Size:
    """What is run; the defaults are the issue's.

    Attributes:
        names, folders, resident: Names of the large case, their folders, and how many names the control has.
        copies: Host copies.
        cold, rate, seconds: Adapters of the cold case, its requests a second, and how long each case lasts.
        prompt, tokens: Of every request.
        burst: Requests at once that measure the capacity.
    """

    names: int = 1000
    folders: int = 40
    resident: int = 48
    copies: int = 200
    cold: int = 48
    rate: float = 16.0
    seconds: float = 30.0
    prompt: int = 256
    tokens: int = 32
    burst: int = 512


TINY = Size(names=60, folders=6, resident=6, copies=12, cold=6, rate=4.0, seconds=5.0, prompt=32, tokens=8, burst=24)


def make_engine(small: bool, size: Size) -> Engine:
    """The shipped preset with random weights; on a CPU a tiny model with eight pages."""
    if small:
        serve = {"prefill": 64, "chunks": 4, "decode": 16}
        few = {"max_model_len": 128, "max_num_seqs": 16, "max_adapters": 8, "max_lora_rank": 16}
        cfg = EngineConfig(**few, buckets=(Bucket(decode=16), Bucket(**serve)))
    else:
        cfg = engine_config("gpu")
    spec = tiny() if small else llama_8b()
    params = jax.block_until_ready(init_random(spec, jax.random.key(0), jnp.dtype(cfg.dtype)))
    return Engine(spec, params, replace(cfg, max_host_adapters=size.copies))


def make_folders(root: Path, spec: DecoderSpec, count: int) -> list[Path]:
    """PEFT folders of different adapters of rank 16 on all seven projections, in bfloat16."""
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    shape = resolve_shape(lora, spec)
    weights, rng = init_weights(shape, lora, spec, 0), np.random.default_rng(0)
    for pair in weights.values():
        pair["lora_B"] = 0.01 * rng.standard_normal(pair["lora_B"].shape, np.float32)
    write_peft(root / "first", weights, shape, spec, config=lora)
    tensors = load_file(root / "first" / WEIGHTS_FILE)
    tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    own = sorted(tensors)[0]
    folders = [root / f"{i}" for i in range(count)]
    for folder in folders:
        folder.mkdir()
        shutil.copyfile(root / "first" / CONFIG_FILE, folder / CONFIG_FILE)
        changed = rng.standard_normal(tensors[own].shape, np.float32).astype(ml_dtypes.bfloat16)
        save_file(tensors | {own: changed}, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    shutil.rmtree(root / "first")
    return folders


def register(engine: Engine, prefix: str, count: int, folders: Sequence[Path]) -> list[float]:
    """Loads adapters; returns the milliseconds of each call."""
    times = []
    for i in range(count):
        started = time.perf_counter()
        engine.load_adapter(f"{prefix}{i}", folders[i % len(folders)])
        times.append(1e3 * (time.perf_counter() - started))
    return times


@contextmanager
def load_times(engine: Engine) -> Iterator[list[float]]:
    """Collects the milliseconds that every load takes in the loop's thread: pages, eviction, the donated call."""
    found: list[float] = []
    ensure = engine.adapters.ensure_resident

    def timed(version: Any) -> tuple[int, ...]:
        loads, started = version.pages is None, time.perf_counter()
        pages = ensure(version)
        if loads:
            found.append(1e3 * (time.perf_counter() - started))
        return pages

    engine.adapters.ensure_resident = timed
    try:
        yield found
    finally:
        del engine.adapters.ensure_resident


def play(engine: Engine, due: Sequence[Arrival], seed: int) -> list[Served]:
    """Submits requests when they are due, while the engine's own thread serves them; returns once all have ended.

    Every play has a seed of its own: its prompts are not in the prefix cache.
    """
    clock = engine.loop.clock
    start, served = clock() + 0.1, []
    waits = threading.Event()
    for i, one in enumerate(due):
        waits.wait(max(0.0, start + one.at - clock()))
        prompt = made_up_prompt(one, engine.spec.vocab_size, i, seed)
        params = SamplingParams(temperature=0, max_tokens=one.output_length, ignore_eos=True)
        served.append(Served(one, start + one.at, engine.submit(prompt, one.adapter, params)))
        for request in served[-1].submitted.requests:
            request.metrics.arrival_time = start + one.at
    engine.wait(lambda: all(s.submitted.finished for s in served))
    failed = [s.submitted.requests[0].stop_reason for s in served if s.submitted.requests[0].finish_reason != "length"]
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed, the first because of {failed[0]}")
    return served


def workload(size: Size, names: Sequence[str], rate: float, seed: int) -> list[Arrival]:
    """Poisson arrivals, Zipf(1.0) over the names."""
    spans = {"input_len": (size.prompt, size.prompt), "output_len": (size.tokens, size.tokens)}
    count = max(8, round(size.seconds * rate))
    return arrivals(Workload(rate=rate, num_requests=count, assign="zipf", zipf=1.0, seed=seed, **spans), names)


def cold(engine: Engine, size: Size, folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Adapters that all fit, touched for the first time under traffic."""
    case = f"residency/cold{size.cold}"
    registered = register(engine, "c", size.cold, folders)
    with load_times(engine) as loads:
        due = workload(size, [f"c{i}" for i in range(size.cold)], size.rate, seed=1)
        found = latencies(play(engine, due, seed=1))
    for i in range(size.cold):
        engine.unload_adapter(f"c{i}")
    return [
        record(case, "register_ms", statistics.median(registered), "ms", bound=20.0),
        record(case, "register_max_ms", max(registered), "ms", bound=20.0),
        record(case, "median_ttft_ms", found["median_ttft_ms"], "ms", bound=60.0),
        record(case, "p99_ttft_ms", found["p99_ttft_ms"], "ms", bound=300.0),
        record(case, "p99_tpot_ms", found["p99_tpot_ms"], "ms", bound=25.0),
        record(case, "worst_load_ms", max(loads), "ms", bound=5.0, note=f"{len(loads)} loads"),
    ]


def capacity(engine: Engine, size: Size) -> float:
    """Requests a second, of a burst over the names that are resident."""
    spans = {"at": 0.0, "input_length": size.prompt, "output_length": size.tokens}
    burst = [Arrival(**spans, adapter=f"n{i % size.resident}") for i in range(size.burst)]
    play(engine, burst[: size.resident], seed=2)
    started = time.perf_counter()
    play(engine, burst, seed=3)
    return size.burst / (time.perf_counter() - started)


def beyond(engine: Engine, size: Size, folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Many names on few pages, and the same arrivals on names that are all resident."""
    case = f"residency/{size.names}in{engine.cfg.max_adapters}"
    registered = register(engine, "n", size.names, folders)
    rate = 0.7 * capacity(engine, size)
    due = workload(size, [f"n{i}" for i in range(size.names)], rate, seed=2)
    few = [replace(one, adapter=f"n{int(one.adapter[1:]) % size.resident}") for one in due]
    fits = latencies(play(engine, few, seed=4))
    with load_times(engine) as loads:
        found = latencies(play(engine, due, seed=5))
    note = f"{rate:.1f} requests a second; {len(loads)} loads for {len(due)} requests"
    ratios = {name: found[f"{name}_ttft_ms"] / fits[f"{name}_ttft_ms"] for name in ("median", "p99")}
    return [
        record(case, "register_ms", statistics.median(registered), "ms", bound=20.0),
        record(case, "register_max_ms", max(registered), "ms", bound=20.0),
        record(case, "median_ttft_ratio", ratios["median"], "x", bound=2.0, note=note),
        record(case, "p99_ttft_ratio", ratios["p99"], "x", bound=4.0, note=note),
        *(record(case, key, found[key], "ms") for key in ("median_ttft_ms", "p99_ttft_ms", "p99_tpot_ms")),
        *(record(case, f"resident_{key}", fits[key], "ms") for key in ("median_ttft_ms", "p99_ttft_ms", "p99_tpot_ms")),
        record(case, "worst_load_ms", max(loads, default=0.0), "ms", bound=5.0, note=note),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model, for a CPU")
    parser.add_argument("--seconds", type=float, help="of each case")
    parser.add_argument("--out", type=Path, help="folder for the result, instead of benchmarks/results")
    args = parser.parse_args()
    size = TINY if args.tiny else Size()
    size = size if args.seconds is None else replace(size, seconds=args.seconds)
    with tempfile.TemporaryDirectory() as root, make_engine(args.tiny, size) as engine:
        folders = make_folders(Path(root), engine.spec, max(size.folders, size.cold))
        engine.start()
        records = cold(engine, size, folders) + beyond(engine, size, folders[: size.folders])
        engine.check_integrity()
    for r in records:
        print(f"{r['case']:22} {r['metric']:26} {r['value']:10.3f} {r['unit']:3} {r.get('note', '')}")
    name = "residency_tiny" if args.tiny else "residency"
    print(write(name, {"size": vars(size), "spec": "tiny" if args.tiny else "llama_8b"}, records, folder=args.out))


if __name__ == "__main__":
    main()
