"""The whole system at Llama-3.1-8B shapes with random weights, through Engine: decode, training, both at once.

    python -m benchmarks.unified.smoke            # on a GPU
    python -m benchmarks.unified.smoke --tiny     # the same code on a CPU, to see that it runs

Cases (design section 9): decode/B32/n{0,4,32} ms_per_step, train/4x1024 tok_s and peak_gb, unified/smoke.
"""

import argparse
import statistics
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.results import record, write
from loquetier_jax import Bucket, Engine, EngineConfig, LoraConfig, SamplingParams, TrainConfig
from loquetier_jax.adapters.lora import init_weights, resolve_shape
from loquetier_jax.models.load import init_random
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.train.data import Dataset, make_sample

# vLLM 0.22.1 and PEFT 0.21 on an H200, 2026-11 (bounds of the issue beside them).
VLLM = {0: 5.82, 4: 8.36, 32: 18.94}
BOUND = {0: 9.0, 4: 13.0, 32: 13.0}
PEFT_TOK_S, TRAIN_BOUND = 9140, 14500


def llama_8b() -> DecoderSpec:
    """Llama-3.1-8B's shapes."""
    return DecoderSpec(
        model_type="llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, intermediate_size=14336, vocab_size=128256, max_position_embeddings=131072, rms_norm_eps=1e-5,
        rope_theta=500000.0, sliding_window=(None,) * 32,
    )  # fmt: skip


def tiny() -> DecoderSpec:
    """The same model, small enough for a CPU."""
    return DecoderSpec(
        model_type="llama", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, intermediate_size=160, vocab_size=512, max_position_embeddings=4096, sliding_window=(None,) * 2,
    )  # fmt: skip


def make_engine(small: bool, context: int, pack: int) -> Engine:
    """An engine with the buckets of this benchmark."""
    spec = tiny() if small else llama_8b()
    dtype = "float32" if small else "bfloat16"
    decode = {"decode": 32}
    prefill = {"prefill": 64 if small else 2048, "chunks": 4, **decode}
    cfg = EngineConfig(
        dtype=dtype, max_model_len=context, kv_page_size=64, max_num_seqs=32, max_adapters=40, max_lora_rank=64,
        train_pages=4, slice_layers=0 if small else 8, buckets=(
            Bucket(**decode), Bucket(**prefill), Bucket(packs=1, pack_tokens=pack, **decode),
            Bucket(packs=4, pack_tokens=pack),
        ),
    )  # fmt: skip
    started = time.perf_counter()
    params = jax.block_until_ready(init_random(spec, jax.random.key(0), jnp.dtype(dtype)))
    print(f"weights {time.perf_counter() - started:.1f} s", flush=True)
    started = time.perf_counter()
    engine = Engine(spec, params, cfg)
    print(f"engine ready {time.perf_counter() - started:.1f} s", flush=True)
    return engine


def load_adapters(engine: Engine, count: int) -> list[str]:
    """`count` distinct rank-16 adapters on all seven projections; B is not zero."""
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    shape = resolve_shape(lora, engine.spec)
    weights = init_weights(shape, lora, engine.spec, 0)
    rng = np.random.default_rng(0)
    for pair in weights.values():
        pair["lora_B"] = (0.01 * rng.standard_normal(pair["lora_B"].shape, np.float32)).astype(np.float32)
    names = [f"adapter-{i}" for i in range(count)]
    for name in names:
        engine.add_adapter(name, weights, shape)
        engine.pin_adapter(name)
    return names


def decode_ms(engine: Engine, adapters: Sequence[str | None], prompt: int, tokens: int) -> float:
    """Median milliseconds between the tokens of 32 requests that all decode."""
    rng = np.random.default_rng(1)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    ids = rng.integers(2, engine.spec.vocab_size, (32, prompt)).tolist()
    outputs = engine.generate(ids, [adapters[i % len(adapters)] for i in range(32)], params)
    times = np.sort(np.unique(np.concatenate([o.outputs[0].metrics.token_times for o in outputs])))
    steady = times[times >= max(o.outputs[0].metrics.first_token_time for o in outputs)]
    return 1e3 * statistics.median(np.diff(steady))


def dataset(engine: Engine, samples: int, length: int) -> Dataset:
    """Random samples that fill a pack each."""
    rng = np.random.default_rng(2)
    ids = rng.integers(2, engine.spec.vocab_size, (samples, length + 1)).tolist()
    return Dataset("random", tuple(make_sample(i, [True] * len(i)) for i in ids), 0)


def train_config(steps: int, pack: int) -> TrainConfig:
    return TrainConfig(max_steps=steps, pack_tokens=pack, per_device_train_batch_size=4, learning_rate=1e-4)


def finetune(engine: Engine, name: str, steps: int, pack: int):
    """A rank-16 job of 4 packs a step, AdamW."""
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    return engine.finetune(name, dataset(engine, 16, pack), lora=lora, train=train_config(steps, pack))


def train_tok_s(engine: Engine, steps: int, pack: int) -> tuple[float, float]:
    """(tokens a second, optimizer included; peak GB) of one job alone, after two steps of warm-up."""
    job = finetune(engine, "alone", steps, pack)
    started = time.perf_counter()
    engine.wait(lambda: job.step >= 2)
    print(f"training compiled and warm after {time.perf_counter() - started:.1f} s", flush=True)
    job.wait()
    times = [line["time"] for line in job.metrics]  # when each optimizer step had been read
    seconds = (times[-1] - times[1]) / (len(times) - 2)
    stats = jax.devices()[0].memory_stats() or {}
    return 4 * pack / seconds, stats.get("peak_bytes_in_use", 0) / 1e9


def unified(
    engine: Engine, adapters: Sequence[str | None], prompt: int, tokens: int, pack: int, rounds: int
) -> list[dict]:
    """32 requests decode while a job trains, `rounds` times: medians of both rates, and step times.

    One round is a few seconds in which a pass more or less changes a rate by a tenth; hence the rounds.
    """
    job = finetune(engine, "beside", 100_000, pack)
    engine.wait(lambda: job.step >= 1)
    iterations: list[tuple[str, float]] = []

    def note(pending, ms: float) -> None:
        keys = [*pending.forward, *pending.quanta]
        parts = [f"{len([k for k in keys if k == key])}x{key[0][0]}:{key[0][1]}" for key in dict.fromkeys(keys)]
        iterations.append(("+".join(parts), ms))

    engine.loop.on_iteration = note
    rng = np.random.default_rng(3)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    rates, gaps = [], []
    for _ in range(rounds):
        ids = rng.integers(2, engine.spec.vocab_size, (32, prompt)).tolist()
        started, before = time.perf_counter(), job.metrics[-1]["num_tokens"]
        outputs = engine.generate(ids, [adapters[i % len(adapters)] for i in range(32)], params)
        seconds = time.perf_counter() - started
        produced, trained = sum(len(o.outputs[0].token_ids) for o in outputs), job.metrics[-1]["num_tokens"] - before
        rates.append((produced / seconds, trained / seconds))
        gaps += [gap for o in outputs for gap in o.outputs[0].metrics.itl]
    engine.loop.on_iteration = None
    job.cancel()
    case = "unified/smoke/none/loquetier_jax"
    out_tok_s, train_tok_s = np.median(rates, axis=0).tolist()
    records = [
        record(case, "out_tok_s", out_tok_s, "tok/s", note=f"median of {rounds} rounds"),
        record(case, "train_tok_s", train_tok_s, "tok/s", note=f"median of {rounds} rounds"),
        record(case, "itl_p50_ms", 1e3 * float(np.median(gaps)), "ms"),
        record(case, "itl_p99_ms", 1e3 * float(np.quantile(gaps, 0.99)), "ms"),
    ]
    for name in sorted({n for n, _ in iterations}):
        times = [ms for n, ms in iterations if n == name]
        records.append(record(f"{case}/{name}", "step_ms", statistics.median(times), "ms", note=f"{len(times)} steps"))
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small model, for a CPU")
    parser.add_argument("--out", type=Path, help="folder for the result, instead of benchmarks/results")
    args = parser.parse_args()
    prompt, tokens, pack, steps, rounds = (40, 12, 64, 6, 2) if args.tiny else (512, 136, 1024, 14, 12)
    engine = make_engine(args.tiny, 64 if args.tiny else 1024, pack)
    adapters = load_adapters(engine, 32)
    records: list[dict] = []

    def decode(n: int, names: Sequence[str | None]) -> list[dict]:
        ms = decode_ms(engine, names, prompt, tokens)
        extra = {"bound": BOUND[n], "peer": "vLLM 0.22.1, measured 2026-11 on an H200", "peer_value": VLLM[n]}
        return [record(f"decode/B32/n{n}", "ms_per_step", ms, "ms", **extra)]

    def train() -> list[dict]:
        rate, peak = train_tok_s(engine, steps, pack)
        extra = {"bound": TRAIN_BOUND, "peer": "PEFT 0.21, measured 2026-11 on an H200", "peer_value": PEFT_TOK_S}
        case = "train/4x1024"
        return [record(case, "tok_s", rate, "tok/s", **extra), record(case, "peak_gb", peak, "GB")]

    cases = [lambda n=n, names=names: decode(n, names) for n, names in ((0, [None]), (4, adapters[:4]), (32, adapters))]
    cases += [train, lambda: unified(engine, adapters, prompt, tokens, pack, rounds)]
    failures = 0
    for case in cases:  # one that fails must not cost the others their turn on the machine
        try:
            records += case()
        except Exception:
            traceback.print_exc()
            failures += 1
        for r in records[-2:]:
            print(f"{r['case']} {r['metric']} {r['value']:.2f} {r['unit']}", flush=True)
    for r in records:
        print(f"{r['case']:60} {r['metric']:12} {r['value']:10.2f} {r['unit']}")
    engine.check_integrity()
    path = write("smoke", {"shapes": "tiny" if args.tiny else "Llama-3.1-8B", "prompt": prompt, "tokens": tokens,
                           "rounds": rounds}, records, folder=args.out)  # fmt: skip
    print(path)
    raise SystemExit(failures)


if __name__ == "__main__":
    main()
