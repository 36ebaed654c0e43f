"""Offline throughput: 256 requests of 512 prompt and 128 output tokens, all there at once."""

from benchmarks.results import record
from benchmarks.serving.world import World

REPEATS = 2


def run(world: World) -> list[dict]:
    """offline/256x512x128/n<distinct adapters, 0 = base>, out_tok_s; the best of two runs."""
    count, prompt, tokens = (12, 40, 16) if world.small else (256, 512, 128)
    records = []
    for n in (0, len(world.adapters)):
        names = world.names(count, n)
        best = min(world.seconds(world.prompts(count, prompt), names, tokens) for _ in range(REPEATS))
        records.append(record(f"offline/{count}x{prompt}x{tokens}/n{n}", "out_tok_s", count * tokens / best, "tok/s"))
    return records
