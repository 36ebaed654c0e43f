"""Segmented multi-LoRA multiplication (SMLM): one op for train, score, prefill and decode rows."""

from pallas_kernels.smlm.api import smlm
from pallas_kernels.smlm.delta import add_delta, delta_beside, smlm_delta
from pallas_kernels.smlm.gated import Gated, gate_fused, smlm_gated
from pallas_kernels.smlm.pack import pack_backward_dy, pack_backward_x, pack_expand
from pallas_kernels.smlm.pack_glu import pack_glu_backward
from pallas_kernels.smlm.pack_pool import add_gradients
from pallas_kernels.smlm.plan import (
    RANK_PAGE,
    TILE,
    WIDE,
    SmlmPlan,
    build_plan,
    num_tiles_bound,
    num_wide_bound,
    plan_shapes,
)
from pallas_kernels.smlm.ref import smlm_ref

__all__ = [
    "RANK_PAGE",
    "TILE",
    "WIDE",
    "Gated",
    "SmlmPlan",
    "add_delta",
    "add_gradients",
    "build_plan",
    "delta_beside",
    "gate_fused",
    "num_tiles_bound",
    "num_wide_bound",
    "pack_backward_dy",
    "pack_backward_x",
    "pack_expand",
    "pack_glu_backward",
    "plan_shapes",
    "smlm",
    "smlm_delta",
    "smlm_gated",
    "smlm_ref",
]
