"""Segmented multi-LoRA multiplication (SMLM): one op for train, score, prefill and decode rows."""

from pallas_kernels.smlm.api import smlm
from pallas_kernels.smlm.backward import smlm_bwd, smlm_expand
from pallas_kernels.smlm.forward import smlm_fwd
from pallas_kernels.smlm.plan import (
    RANK_PAGE,
    TILE,
    WIDE,
    SmlmPlan,
    build_plan,
    num_tiles_bound,
    num_wide_bound,
    pack_plan,
    plan_shapes,
)
from pallas_kernels.smlm.ref import smlm_ref
from pallas_kernels.smlm.tuning import FEW_ROWS

__all__ = [
    "FEW_ROWS",
    "RANK_PAGE",
    "TILE",
    "WIDE",
    "SmlmPlan",
    "build_plan",
    "num_tiles_bound",
    "num_wide_bound",
    "pack_plan",
    "plan_shapes",
    "smlm",
    "smlm_bwd",
    "smlm_expand",
    "smlm_fwd",
    "smlm_ref",
]
