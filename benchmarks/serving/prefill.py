"""Prefill throughput: 128 prompts of 512 tokens, one output token each."""

from benchmarks.results import record
from benchmarks.serving.world import World

REPEATS = 2


def run(world: World) -> list[dict]:
    """prefill/n<distinct adapters, 0 = base>, tok_s; the best of two runs."""
    count, prompt = (8, 40) if world.small else (128, 512)
    records = []
    for n in (0, len(world.adapters)):
        names = world.names(count, n)
        best = min(world.seconds(world.prompts(count, prompt), names, 1) for _ in range(REPEATS))
        records.append(record(f"prefill/n{n}", "tok_s", count * prompt / best, "tok/s"))
    return records
