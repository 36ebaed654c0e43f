"""What LoRA adds to a step of an 8B-shaped model: device time alone, with the host out of the way.

    python -m benchmarks.unified.lora_overhead            # on a GPU; writes results/<device>/lora_overhead.json
    python -m benchmarks.unified.lora_overhead --tiny     # the same code on a CPU, to see that it runs

The compiled step runs many times in a loop on the device, its state carried as a real engine donates it; a call of
that loop is timed. "none" is the same step with every LoRA operation compiled out.
Cases: decode/B32/n{none,0,4,32} and decode/B128/..., mixed/n{none,11} (1024 train + 512 prefill + 32 decode rows).
"""

import argparse
import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks.results import record, write
from benchmarks.running import decode_items, mixed_items
from benchmarks.unified.smoke import llama_8b, tiny
from loquetier_jax import Bucket, EngineConfig
from loquetier_jax.adapters.pages import AdapterPages, LoraPages
from loquetier_jax.batch.pack import StepItems, pack_step
from loquetier_jax.batch.rows import empty_batch, empty_sample, ravel, shapes_of, unravel
from loquetier_jax.models.decoder import gated
from loquetier_jax.models.load import init_random
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.step import backward, unified
from loquetier_jax.step.compiled import compiler_options
from loquetier_jax.step.head import distribution
from loquetier_jax.step.ops import ForwardOps
from loquetier_jax.step.replay import ReplayOps, with_transpose
from loquetier_jax.step.sample import empty_slots, sample
from loquetier_jax.step.state import DeviceState, head_params, new_state
from loquetier_jax.step.unified import ForwardOut, unified_step

VLLM_ADDS_MS = {4: 2.54, 32: 13.12}  # vLLM 0.22.1, decode B=32, measured 2026-11 on an H200
BOUND_ADDS_MS = {4: 0.4, 32: 1.2}
BOUND_SHARE = 0.10  # of the mixed step's forward, and of its backward


class PlainForwardOps(ForwardOps):
    """The forward without a single LoRA operation."""

    def linear(self, group: str, h: jax.Array) -> jax.Array:
        return self.keep(group, self.weights[group].dot(h))

    def mlp(self, h: jax.Array) -> jax.Array:
        return self.linear("down_proj", gated(self.spec, self.linear("gate_up_proj", h)))


class PlainReplayOps(ReplayOps):
    """The replay without a single LoRA operation."""

    def linear(self, group: str, h: jax.Array) -> jax.Array:
        transpose = functools.partial(self._base_transpose, group)
        return with_transpose(lambda h: self._base(group, h), lambda dy, _: (transpose(dy),), h)

    def _base(self, group: str, h: jax.Array) -> jax.Array:
        return self.kept[group] if group in self.kept else self.weights[group].dot(h)

    def mlp(self, h: jax.Array) -> jax.Array:
        return self.linear("down_proj", gated(self.spec, self.linear("gate_up_proj", h)))


@contextlib.contextmanager
def without_lora() -> Iterator[None]:
    """Steps traced inside have no adapters at all."""
    with (
        mock.patch.object(unified, "ForwardOps", PlainForwardOps),
        mock.patch.object(backward, "ReplayOps", PlainReplayOps),
        mock.patch.object(backward, "scatter_add_pages", lambda pools, *_, **__: pools),
    ):
        yield


def fresh(tree: Any, carried: jax.Array) -> Any:
    """The same values, of which the compiler cannot know that they are the same in every turn of a loop."""
    return jax.lax.optimization_barrier((tree, carried))[0]


class Bench:
    """Weights, adapters and state on the device; compiled loops over one bucket."""

    def __init__(self, spec: DecoderSpec, cfg: EngineConfig, params: Any) -> None:
        self.spec, self.cfg = spec, cfg
        state = new_state(spec, cfg, params)
        self.state: DeviceState = dataclasses.replace(state, pages=self._random_pages(state))

    def _random_pages(self, state: DeviceState) -> AdapterPages:
        """Every page an adapter of rank 16 on all projections; the same numbers in every layer."""
        dtype = jnp.dtype(self.cfg.dtype)

        @functools.partial(jax.jit, static_argnums=(1, 2))
        def draw(seed: int, shape: tuple[int, ...], scale: float) -> jax.Array:
            return (scale * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)

        return AdapterPages(
            [
                {
                    group: LoraPages(draw(i, old.A.shape, old.A.shape[2] ** -0.5), draw(-i, old.B.shape, 0.01))
                    for i, (group, old) in enumerate(layer.items(), start=1)
                }
                for layer in state.pages.layers
            ]
        )

    def flat(self, items: StepItems, bucket: Bucket) -> jax.Array:
        return jnp.asarray(ravel(pack_step(items, bucket, self.cfg).batch))

    def forward_loop(self, bucket: Bucket, steps: int) -> Callable[[jax.Array], Any]:
        """Compiles `steps` forwards, each with its greedy sampler, in a loop: flat -> the last ForwardOut.

        Cache and slots are carried and donated; the slots are the loop's own, and all tokens go to the trash slot.
        """
        spec, cfg, state = self.spec, self.cfg, self.state
        template = shapes_of(empty_batch(bucket, cfg))
        step = functools.partial(unified_step, spec, cfg, bucket, False)
        draw = functools.partial(sample, rows=empty_sample(bucket.samples, cfg), level="greedy", max_logprobs=0)

        def run(params: Any, pages: Any, kv: Any, slots: Any, out: Any, flat: jax.Array) -> Any:
            def turn(_: Any, carried: Any) -> Any:
                kv, slots, _ = carried
                batch = unravel(template, fresh(flat, slots.last_token))
                kv, out = step(params, pages, kv, slots.last_token, batch)
                slots, _ = draw(distribution(spec, params, out.sample_hidden), slots=slots)
                return kv, slots, out

            return jax.lax.fori_loop(0, steps, turn, (kv, slots, out))

        flat = jax.ShapeDtypeStruct(self.flat(StepItems(), bucket).shape, jnp.int32)
        out = jax.eval_shape(step, state.params, state.pages, state.kv, state.slots.last_token, template)[1]
        args = (state.params, state.pages, state.kv, state.slots, out, flat)
        lowered = jax.jit(run, donate_argnums=(2, 3, 4)).lower(*map(shapes_of, args[:4]), out, flat)
        loop = lowered.compile(compiler_options(bucket))  # as an engine compiles it, with LoRA and without
        held = [empty_slots(cfg.max_num_seqs, spec.vocab_size), jax.tree.map(jnp.zeros_like, out)]

        def turns(params: Any, pages: Any, kv: Any, _: Any, flat: jax.Array) -> Any:
            kv, *held[:] = loop(params, pages, kv, *held, flat)
            return kv, held[1]

        def call(flat: jax.Array) -> Any:
            return state.run_forward(turns, flat)

        call.text = loop.as_text
        return call

    def backward_loop(self, bucket: Bucket, items: StepItems, out: ForwardOut, steps: int) -> Callable[[], Any]:
        """Compiles `steps` backwards, head and loss included, in a loop; the gradient pool is carried and donated."""
        spec, cfg, state = self.spec, self.cfg, self.state
        batch = pack_step(items, bucket, cfg).batch
        train, flat = shapes_of(batch.train), jnp.asarray(ravel(batch.train))
        start = functools.partial(backward.backward_start, spec, cfg, bucket.packs, None, train)
        slices = functools.partial(backward.backward_slice, spec, cfg, bucket.pack_tokens, 1, False, 0, train)
        zero = jnp.int32(0)

        def run(head: Any, layers: Any, pages: Any, kept: Any, hidden: Any, logp: Any, dx: Any, grads: Any, flat: Any):
            def turn(_: Any, carried: Any) -> Any:
                dx, grads = carried
                now_pages, now_kept, now_hidden, now_flat = fresh((pages, kept, hidden, flat), dx)
                dx, _ = start(head, now_hidden, logp, now_flat, {})
                return slices(layers, now_pages, now_kept, dx, grads, zero, now_flat)

            return jax.lax.fori_loop(0, steps, turn, (dx, grads))

        head, kept, logp = head_params(state.params), out.kept, out.train["logp"]
        fixed = (head, state.params["layers"], state.pages, kept, out.hidden, logp)
        loop = jax.jit(run, donate_argnums=(6, 7)).lower(*fixed, out.hidden, state.grads, flat).compile()
        held = [jnp.zeros_like(out.hidden)]

        def call() -> Any:
            layers = spec.num_hidden_layers
            held[0] = state.backward(lambda *a: loop(*fixed, *a[3:5], a[6]), 0, layers, kept, held[0], flat)
            return held[0], state.grads

        call.text = loop.as_text
        return call


def timed(call: Callable[..., Any], steps: int, repeats: int) -> float:
    """Median milliseconds of one step."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(call())
        times.append((time.perf_counter() - started) / steps)
    return 1e3 * statistics.median(times)


def bench_decode(bench: Bench, rows: int, context: int, steps: int, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of a decode step: without LoRA, with no adapter in the batch, with 4 and with 32 adapters."""
    bucket, case = Bucket(decode=rows), f"decode/B{rows}"
    batches = {n: bench.flat(StepItems(decode=decode_items(bench.cfg, rows, n, context)), bucket) for n in (0, 4, 32)}
    with without_lora():
        plain = bench.forward_loop(bucket, steps)
    base = timed(lambda: plain(batches[0]), steps, repeats)
    records = [record(f"{case}/none", "device_ms_per_step", base, "ms")]
    loop = bench.forward_loop(bucket, steps)
    for n, flat in batches.items():
        ms = timed(lambda flat=flat: loop(flat), steps, repeats)
        bound = {"bound": BOUND_ADDS_MS[n], "peer": "vLLM 0.22.1", "peer_value": VLLM_ADDS_MS[n]} if n else {}
        records.append(record(f"{case}/n{n}", "device_ms_per_step", ms, "ms"))
        records.append(record(f"{case}/n{n}", "lora_adds_ms", ms - base, "ms", **(bound if rows == 32 else {})))
    return records


def bench_mixed(bench: Bench, pack: int, prefill: int, context: int, steps: int, repeats: int) -> list[dict[str, Any]]:
    """The mixed step's forward, and the backward of its train rows, with and without LoRA."""
    bucket = Bucket(packs=1, pack_tokens=pack, prefill=prefill, chunks=2, decode=32)
    items, ms = mixed_items(bench.cfg, bench.spec.vocab_size, pack, prefill, 32, context), {}
    flat = bench.flat(items, bucket)
    for name, lora in (("none", without_lora), ("n11", contextlib.nullcontext)):
        with lora():
            ahead = bench.forward_loop(bucket, steps)
        ms["fwd", name] = timed(lambda run=ahead: run(flat), steps, repeats)
        out = ahead(flat)
        with lora():
            back = bench.backward_loop(bucket, items, out, steps)
        ms["bwd", name] = timed(back, steps, repeats)
        del ahead, back, out
    records = [record(f"mixed/{name}", f"{way}_device_ms", value, "ms") for (way, name), value in ms.items()]
    for way in ("fwd", "bwd"):
        share = ms[way, "n11"] / ms[way, "none"] - 1
        records.append(record("mixed/n11", f"{way}_lora_adds", share, "of the step without", bound=BOUND_SHARE))
    return records


def make_config(small: bool, rank: int) -> EngineConfig:
    return EngineConfig(
        dtype="float32" if small else "bfloat16", max_model_len=64 if small else 640, kv_page_size=16 if small else 64,
        max_num_seqs=128, max_adapters=32, max_lora_rank=rank, train_pages=1,
        buckets=(Bucket(decode=32), Bucket(prefill=64, chunks=1)),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small model, for a CPU")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, to explore")
    parser.add_argument("--rank", type=int, default=16, help="largest rank that the engine takes; adapters have 16")
    parser.add_argument("--cases", nargs="*", default=["B32", "B128", "mixed"])
    parser.add_argument("--out", type=Path, help="folder for the result, instead of benchmarks/results")
    args = parser.parse_args()
    spec = tiny() if args.tiny else llama_8b()
    layers = args.layers or spec.num_hidden_layers
    spec = dataclasses.replace(spec, num_hidden_layers=layers, sliding_window=(None,) * layers)
    cfg = make_config(args.tiny, args.rank)
    bench = Bench(spec, cfg, init_random(spec, jax.random.key(0), jnp.dtype(cfg.dtype)))
    context, steps, repeats = (40, 2, 1) if args.tiny else (580, 40, 5)
    pack, prefill, few = (64, 32, 2) if args.tiny else (1024, 512, 10)
    cases = {
        "B32": lambda: bench_decode(bench, 32, context, steps, repeats),
        "B128": lambda: bench_decode(bench, 128, context, steps, repeats),
        "mixed": lambda: bench_mixed(bench, pack, prefill, context, few, repeats),
    }
    records = []
    for name in args.cases:
        found = cases[name]()
        records += found
        for r in found:
            print(f"{r['case']:20} {r['metric']:20} {r['value']:9.4f} {r['unit']}", r.get("bound", ""), flush=True)
    config = {
        "shapes": "tiny" if args.tiny else "Llama-3.1-8B",
        "layers": layers,
        "max_lora_rank": args.rank,
        "context": context,
        "timing": f"loops of {steps} (mixed: {few}) steps on the device, median of {repeats}",
    }
    print(write("lora_overhead", config, records, folder=args.out))


if __name__ == "__main__":
    main()
