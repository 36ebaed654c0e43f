"""What the compiled functions of an engine are made from, for their keys on disk."""

from dataclasses import fields
from typing import Any

import jax

from loquetier_jax.config import EngineConfig
from loquetier_jax.models.spec import DecoderSpec

NOT_COMPILED = {
    *{"buckets", "slo", "max_host_adapters", "compilation_cache_dir", "seed", "enable_prefix_caching"},
    *{"gpu_memory_utilization", "train_memory_gb"},
}
"""Fields of EngineConfig that no traced function reads. A function's bucket is in its own key."""


def compile_key(spec: DecoderSpec, cfg: EngineConfig, shapes: Any = None) -> tuple[Any, ...]:
    """A key whose repr is the same in every process.

    Args:
        spec, cfg: The base and the engine; every field counts that is not named in NOT_COMPILED.
        shapes: A tree of arrays or ShapeDtypeStructs: the functions' arguments.
    """
    leaves, tree = jax.tree.flatten(shapes)
    arrays = tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
    values = tuple((f.name, getattr(cfg, f.name)) for f in fields(cfg) if f.name not in NOT_COMPILED)
    return spec, values, arrays, str(tree)
