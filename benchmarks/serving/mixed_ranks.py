"""What tenants of rank 8 lose when others of rank 128 share the engine: p99 TTFT with and without them."""

from benchmarks.results import record
from benchmarks.serving.arrivals import served
from benchmarks.serving.world import World
from loquetier_jax import LoraConfig
from loquetier_jax.adapters.lora import init_weights, resolve_shape

TENANTS = 4


def run(world: World) -> list[dict]:
    """mixed_ranks/r8/{alone,beside}: TTFT p99 of four tenants of rank 8; beside: half of the requests have the largest
    rank that the engine takes (at most 128)."""
    large = min(128, world.engine.cfg.max_lora_rank)
    small, big = (_tenants(world, rank) for rank in (8, large))
    rate, lengths = (10.0, (40, 8)) if world.small else (8.0, (512, 128))
    records = []
    for case, names in (("alone", small), ("beside", [n for pair in zip(small, big, strict=True) for n in pair])):
        result = served(world, rate, lengths, names)
        of_small = max(result["adapters"][name]["p99_ttft_ms"] for name in small)
        note = f"others of rank {large}" if case == "beside" else ""
        records.append(record(f"mixed_ranks/r8/{case}", "p99_ttft_ms", of_small, "ms", note=note))
    for name in (*small, *big):
        world.engine.unload_adapter(name)
    return records


def _tenants(world: World, rank: int) -> list[str]:
    """Adds adapters of this rank on all projections; returns their names."""
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    shape = resolve_shape(lora, world.engine.spec)
    weights = init_weights(shape, lora, world.engine.spec, 0)
    names = [f"r{rank}-{i}" for i in range(TENANTS)]
    for name in names:
        world.engine.add_adapter(name, weights, shape)
    return names
