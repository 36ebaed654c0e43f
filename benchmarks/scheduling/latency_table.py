"""Measures what every compiled function of the gpu preset takes on this card, at Llama-3.1-8B shapes: a LatencyTable.

    python -m benchmarks.scheduling.latency_table                          # on a GPU; most of it is compiling
    python -m benchmarks.scheduling.latency_table --tiny --out table.yaml  # the same code on a CPU, to see that it runs

Writes configs/latency/<device>.yaml. Rows are like real ones: decode rows at the context of a request of 512/128 in its
middle, prompts of 512, four adapters of rank 16, full packs. The time of a forward is that of the greedy sampler behind
it, too, where rows sample.
"""

import argparse
import datetime
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.results import commit, device_name, versions
from benchmarks.running import running
from benchmarks.unified.smoke import llama_8b, tiny
from loquetier_jax import Bucket, EngineConfig, LoraConfig, SamplingParams, TrainConfig
from loquetier_jax.adapters.lora import LoraShape, LoraWeights, init_weights, resolve_shape
from loquetier_jax.adapters.pages import pages_of
from loquetier_jax.batch.pack import PackedStep, ScoreItem, StepItems, TrainItem, pack_step
from loquetier_jax.batch.packs import Pack
from loquetier_jax.batch.rows import ravel
from loquetier_jax.models.load import init_random
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.presets import configs_folder, engine_config
from loquetier_jax.runtime.warmup import enable_compilation_cache
from loquetier_jax.schedule.table import LatencyTable, Timed
from loquetier_jax.serve.request import Request
from loquetier_jax.step.compiled import StepFunctions, TrainKey
from loquetier_jax.step.state import DeviceState, new_state
from loquetier_jax.step.unified import ForwardOut
from loquetier_jax.train.data import make_sample
from loquetier_jax.train.micro_step import MicroStep
from loquetier_jax.train.optimizer import build_optimizer_step, hyperparams, init_state
from loquetier_jax.train.packing import build_pack

ADAPTERS = 4
REPEATS, CHAIN = 5, 4  # medians; calls without train rows are timed in chains, as the engine's follow each other
GREEDY = SamplingParams(temperature=0.0)


@dataclass
class Bench:
    """What is measured: the functions of one engine and rows for them."""

    spec: DecoderSpec
    cfg: EngineConfig
    prompt: int
    output: int
    model: str
    state: DeviceState = field(init=False)
    functions: StepFunctions = field(init=False)
    shape: LoraShape = field(init=False)
    weights: LoraWeights = field(init=False)

    def __post_init__(self) -> None:
        params = jax.block_until_ready(init_random(self.spec, jax.random.key(0), jnp.dtype(self.cfg.dtype)))
        self.state = new_state(self.spec, self.cfg, params)
        self.functions = StepFunctions(self.spec, self.cfg, self.state)
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        self.shape = resolve_shape(lora, self.spec)
        self.weights = init_weights(self.shape, lora, self.spec, 0)
        rng = np.random.default_rng(0)
        for pair in self.weights.values():
            pair["lora_B"] = (0.01 * rng.standard_normal(pair["lora_B"].shape)).astype(np.float32)
        one = pages_of(self.weights, self.shape, self.spec, self.cfg.dtype)
        for page in range(1, ADAPTERS + 1):
            self.state.write_adapter((page,), one)

    @property
    def passes(self) -> list[TrainKey]:
        """The shapes of passes, as a job of rank 16 has them."""
        tokens = {b.pack_tokens for b in self.cfg.buckets if b.packs}
        shapes = {(b.packs, b.pack_tokens) for b in self.cfg.buckets if b.packs} | {(1, n) for n in tokens}
        return [TrainKey(packs, size, self.shape.num_pages) for packs, size in sorted(shapes)]

    @property
    def buckets(self) -> list[Bucket]:
        """All forwards, those of passes alone included."""
        return list(dict.fromkeys([*self.cfg.buckets, *(key.bucket for key in self.passes)]))

    def compile(self) -> None:
        """Everything, in parallel: XLA compiles outside of the interpreter's lock."""
        work: list[Callable[[], object]] = [lambda b=b: self.functions.forward(b) for b in self.buckets]
        work += [lambda n=n: self.functions.sampler(n, "greedy") for n in self.cfg.sample_sizes]
        work += [lambda key=key: self.functions.prepare_training(key) for key in self.passes]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda build: build(), work))

    def pack(self, tokens: int) -> Pack:
        """A pack that one sample fills."""
        ids = np.random.default_rng(1).integers(2, self.spec.vocab_size, tokens + 1).tolist()
        return build_pack([make_sample(ids, [True] * len(ids))], [0], tokens)

    def train_items(self, key: TrainKey) -> list[TrainItem]:
        """Full packs of one job."""
        return [TrainItem(self.pack(key.pack_tokens), (1,), (1,))] * key.packs

    def served(self, slot: int, produced: int) -> Request:
        """A request in a slot, with KV pages of its own."""
        pages = -(-(self.prompt + self.output) // self.cfg.kv_page_size)
        first = 1 + slot * pages
        kv_pages = range(first, first + pages)
        return running(slot, (1 + slot % ADAPTERS,), kv_pages, GREEDY, [5] * self.prompt, produced)

    def items(self, bucket: Bucket) -> StepItems:
        """Rows that fill a bucket."""
        chunks = min(bucket.chunks, bucket.prefill // self.prompt)
        rows = min(bucket.decode, self.cfg.max_num_seqs - chunks)
        items = StepItems(
            prefill=[(self.served(rows + c, 0), self.prompt) for c in range(chunks)],
            decode=[self.served(i, self.output // 2) for i in range(rows)],
        )
        if bucket.score_packs:
            items.score = [ScoreItem(self.pack(bucket.score_tokens), (2,))] * bucket.score_packs
        return items

    def forward_ms(self, bucket: Bucket) -> float:
        """A forward; one that a pass begins with runs to the head of its backward."""
        if bucket.packs:
            return statistics.median(self.fused_ms(bucket) for _ in range(REPEATS + 1))
        step, run, times = pack_step(self.items(bucket), bucket, self.cfg), self.functions.forward(bucket), []
        flat, sampler = jax.device_put(ravel(step.batch)), self.sampler(step)
        for _ in range(REPEATS + 1):
            started = time.perf_counter()
            for _ in range(CHAIN):
                out = self.state.run_forward(run, flat)
                tokens = sampler(out)
            jax.block_until_ready((out, tokens))
            times.append(1e3 * (time.perf_counter() - started) / CHAIN)
        return statistics.median(times[1:])

    def sampler(self, step: PackedStep) -> Callable[[ForwardOut], object]:
        """What runs behind a forward of the step: the greedy sampler, or nothing."""
        if step.sample is None:
            return lambda out: None
        flat, run = jax.device_put(ravel(step.sample)), self.functions.sampler(len(step.sample.slots), "greedy")
        return lambda out: self.state.sample(run, out.sample_hidden, flat)

    def fused_ms(self, bucket: Bucket) -> float:
        """One forward with train rows."""
        key = TrainKey(bucket.packs, bucket.pack_tokens, self.shape.num_pages)
        items = self.items(bucket)
        items.train = self.train_items(key)
        step, state = pack_step(items, bucket, self.cfg), self.state
        flat, run, sampler = jax.device_put(ravel(step.batch)), self.functions.forward(bucket), self.sampler(step)
        one = MicroStep(key, items.train, self.cfg.slice_layers)
        started = time.perf_counter()
        out = state.run_forward(run, flat)
        tokens = sampler(out)
        one.take_fused(out, step.batch, self.functions, state)
        jax.block_until_ready((one.tail, tokens))
        return 1e3 * (time.perf_counter() - started)

    def pass_ms(self, key: TrainKey) -> dict[str, float]:
        """One slice of a forward, one of a backward (both on average), and a whole backward."""
        found: dict[str, list[float]] = {"forward_slice": [], "backward_slice": [], "backward": []}
        for repeat in range(2 * (REPEATS + 1)):
            one = MicroStep(key, self.train_items(key), self.cfg.slice_layers)
            slices = len(self.functions.slices(self.cfg.slice_layers))
            started = time.perf_counter()
            one.start_slices(self.cfg, self.functions, self.state)
            while not one.forward_done:
                one.run_forward_slice(self.functions, self.state)
            jax.block_until_ready(one.tail)
            middle = time.perf_counter()
            for _ in range(1 if repeat % 2 else slices):
                one.run_backward(slices if repeat % 2 else 1, self.functions, self.state)
            jax.block_until_ready((one.tail, self.state.grads))
            end = time.perf_counter()
            found["forward_slice"].append(1e3 * (middle - started) / slices)
            name, parts = ("backward", 1) if repeat % 2 else ("backward_slice", slices)
            found[name].append(1e3 * (end - middle) / parts)
        return {name: statistics.median(times[1:]) for name, times in found.items()}

    def optimizer_ms(self) -> float:
        """The optimizer step of one job: AdamW."""
        cfg, state = TrainConfig(max_steps=10), self.state
        step = build_optimizer_step(self.spec, self.shape, cfg.optim)
        master, opt_state = init_state(self.weights, cfg.optim)
        ids = np.ones(self.shape.num_pages, np.int32)
        numbers = {name: np.float32(value) for name, value in hyperparams(cfg, 0, 10).items()}
        times = []
        for _ in range(REPEATS + 1):
            started = time.perf_counter()
            master, opt_state, metrics = state.apply_optimizer(
                step, master, opt_state, ids, ids, np.float32(1024), np.float32(1), numbers
            )
            jax.block_until_ready((metrics, state.pages))
            times.append(1e3 * (time.perf_counter() - started))
        return statistics.median(times[1:])


def make_bench(small: bool) -> Bench:
    """8B shapes and the gpu preset, or something like it that a CPU can run."""
    if not small:
        return Bench(llama_8b(), engine_config("gpu"), 512, 128, "Llama-3.1-8B shapes, random weights, bfloat16")
    cfg = EngineConfig(
        dtype="float32", max_model_len=128, kv_page_size=16, max_num_seqs=8, max_adapters=8, max_lora_rank=16,
        train_pages=2, slice_layers=1, buckets=(
            Bucket(decode=8), Bucket(score_packs=1, score_tokens=64),
            Bucket(prefill=64, chunks=4, decode=8), Bucket(packs=1, pack_tokens=64, decode=8),
            Bucket(packs=2, pack_tokens=64),
        ),
    )  # fmt: skip
    return Bench(tiny(), cfg, 32, 16, "the tiny shapes of benchmarks.unified.smoke, float32")


def measure(bench: Bench) -> LatencyTable:
    """Compiles, runs and times everything."""
    started = time.perf_counter()
    bench.compile()
    print(f"compiled in {time.perf_counter() - started:.0f} s", flush=True)
    forwards, passes = [], {}
    for bucket in bench.buckets:
        forwards.append(Timed(bucket=bucket, ms=bench.forward_ms(bucket)))
        print(f"forward {bucket.name}: {forwards[-1].ms:.2f} ms", flush=True)
    for key in bench.passes:
        passes[key] = bench.pass_ms(key)
        print(f"pass {key.bucket.name}: {passes[key]}", flush=True)
    parts = {
        name: tuple(Timed(bucket=key.bucket, ms=times[name]) for key, times in passes.items())
        for name in ("forward_slice", "backward_slice", "backward")
    }
    return LatencyTable(
        device=jax.devices()[0].device_kind,
        model=bench.model,
        source="python -m benchmarks.scheduling.latency_table",
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        commit=commit(),
        versions=versions(),
        slices=len(bench.functions.slices(bench.cfg.slice_layers)),
        forward=tuple(forwards),
        optimizer_step_ms=bench.optimizer_ms(),
        **parts,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small model, for a CPU")
    parser.add_argument("--out", type=Path, help="file, instead of configs/latency/<device>.yaml")
    args = parser.parse_args()
    enable_compilation_cache(None)
    table = measure(make_bench(args.tiny))
    path = args.out or configs_folder() / "latency" / f"{device_name()}.yaml"
    table.dump(path)
    print(f"optimizer step: {table.optimizer_step_ms:.2f} ms\n{path}")


if __name__ == "__main__":
    main()
