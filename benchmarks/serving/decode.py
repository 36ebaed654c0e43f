"""Milliseconds of a decode step: (time of 136 tokens - time of 8) / 128, prompts of 512 tokens, best of 3."""

from benchmarks.results import record
from benchmarks.serving.world import World

REPEATS = 3


def run(world: World) -> list[dict]:
    """decode/B<rows>/n<distinct adapters, 0 = base>, ms_per_step; the peer's estimator."""
    batches = ((8, (0, 4)), (4, (0,))) if world.small else ((8, (0, 8)), (32, (0, 4, 32)), (128, (0, 4, 32)))
    return [
        record(f"decode/B{rows}/n{n}", "ms_per_step", ms_per_step(world, rows, n), "ms")
        for rows, counts in batches
        for n in counts
    ]


def ms_per_step(world: World, rows: int, distinct: int) -> float:
    """Of `rows` requests that decode together."""
    prompt, few, many = (40, 4, 20) if world.small else (512, 8, 136)
    names = world.names(rows, distinct)

    def best(tokens: int) -> float:
        return min(world.seconds(world.prompts(rows, prompt), names, tokens) for _ in range(REPEATS))

    return 1e3 * (best(many) - best(few)) / (many - few)
