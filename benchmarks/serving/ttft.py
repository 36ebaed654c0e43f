"""Time to first token of a prompt of 512 tokens on an idle engine."""

import statistics

from benchmarks.results import record
from benchmarks.serving.world import World

REPEATS = 10


def run(world: World) -> list[dict]:
    """ttft/idle/n1: ms, the median of ten prompts of 512 tokens on one adapter."""
    prompt = 40 if world.small else 512
    names = world.names(1, 1)
    times = [world.seconds(world.prompts(1, prompt), names, 1) for _ in range(REPEATS)]
    return [record("ttft/idle/n1", "ms", 1e3 * statistics.median(times), "ms")]
