"""The kernels of loquetier_jax: one folder per op, knowing nothing of the runtime."""

from pallas_kernels.paged_attention import AttentionPlan, attend_rows, paged_attention
from pallas_kernels.smlm import SmlmPlan, build_plan, num_tiles_bound, pack_lora, plan_shapes, smlm

__all__ = [
    "AttentionPlan",
    "SmlmPlan",
    "attend_rows",
    "build_plan",
    "num_tiles_bound",
    "pack_lora",
    "paged_attention",
    "plan_shapes",
    "smlm",
]
