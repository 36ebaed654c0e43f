"""What rows that keep their bits cost on a CPU: the same engine as XLA comes, and with its library fusions off.

Processes take turns, because Eigen asks for oneDNN once per process; the best of several rounds counts.
"""

import json
import os
import subprocess
import sys
import time

from benchmarks.results import record, write
from loquetier_jax import Engine, LoraConfig, SamplingParams, TrainConfig
from loquetier_jax.tiny import base_path
from pallas_kernels.common import cpu_bits

ROUNDS = 3
FUSED = {
    "XLA_FLAGS": f"--{cpu_bits.FUSIONS[0]}=dot,individual_dot",  # XLA's default, named so that an engine leaves it
    cpu_bits.EIGEN_WITH_ONEDNN: "1",
}
KEPT = {"XLA_FLAGS": "", cpu_bits.EIGEN_WITH_ONEDNN: "0"}


def measure() -> dict[str, float]:
    """Of the embedded base: milliseconds of a decode step of 8 requests, tokens per second of prefill and training."""
    engine = Engine.from_pretrained(base_path(), config="demo", progress=False)
    prompts = [[5 + i] * 100 for i in range(8)]

    def seconds(max_tokens: int) -> float:
        start = time.perf_counter()
        engine.generate(prompts, None, SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True))
        return time.perf_counter() - start

    def train(steps: int) -> float:
        cfg = TrainConfig(max_steps=steps, per_device_train_batch_size=1, pack_tokens=256)
        start = time.perf_counter()
        engine.finetune(f"job{steps}", [{"text": "x" * 200}] * 4, lora=LoraConfig(r=8), train=cfg).wait()
        return time.perf_counter() - start

    train(1)  # compiles
    first, long = (min(seconds(n) for _ in range(2)) for n in (1, 65))
    short, longer = (train(n) for n in (2, 12))
    return {
        "decode_ms": 1e3 * (long - first) / 64,
        "prefill_tok_s": 800 / first,
        "train_tok_s": 10 * 200 / (longer - short),
    }


def child(environment: dict[str, str]) -> dict[str, float]:
    """`measure` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.unified.cpu_bits", "--child"],
        env=os.environ | environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Writes benchmarks/results/cpu/cpu_bits.json."""
    if "--child" in sys.argv:
        print(json.dumps(measure()))
        return
    runs = [(child(FUSED), child(KEPT)) for _ in range(ROUNDS)]
    records = []
    for metric, best in (("decode_ms", min), ("prefill_tok_s", max), ("train_tok_s", max)):
        fused, kept = (best(run[i][metric] for run in runs) for i in range(2))
        unit = "ms" if metric == "decode_ms" else "tokens/s"
        records.append(record("embedded/f32", metric, kept, unit, peer="XLA's library fusions", peer_value=fused))
        print(f"{metric:14} {fused:9.2f} fused {kept:9.2f} bits kept  {kept / fused:.2f}")
    write("cpu_bits", {"rounds": ROUNDS, "preset": "demo", "cores": os.cpu_count()}, records)


if __name__ == "__main__":
    main()
