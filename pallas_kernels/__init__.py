"""The kernels of loquetier_jax: one folder per op, knowing nothing of the runtime."""

from pallas_kernels.paged_attention import AttentionPlan, attend_rows, paged_attention
from pallas_kernels.smlm import (
    SmlmPlan,
    add_delta,
    add_gradients,
    build_plan,
    delta_beside,
    gate_fused,
    num_tiles_bound,
    num_wide_bound,
    pack_backward_dy,
    pack_backward_x,
    pack_expand,
    pack_glu_backward,
    plan_shapes,
    smlm,
    smlm_delta,
    smlm_gated,
)

__all__ = [
    "AttentionPlan",
    "SmlmPlan",
    "add_delta",
    "add_gradients",
    "attend_rows",
    "build_plan",
    "delta_beside",
    "gate_fused",
    "num_tiles_bound",
    "num_wide_bound",
    "pack_backward_dy",
    "pack_backward_x",
    "pack_expand",
    "pack_glu_backward",
    "paged_attention",
    "plan_shapes",
    "smlm",
    "smlm_delta",
    "smlm_gated",
]
