"""The kernels of loquetier_jax: one folder per op, independent of the runtime.

smlm               Adds every row's LoRA delta, under the row's own adapter, to y; differentiable.
smlm_fwd           Its forward, which also returns the residuals of train rows for the backward.
smlm_bwd           Its backward: the gradient of x, and separate gradients of A and B for each pack.
smlm_glu           The deltas of gate and up, followed by act(gate) * up.
scatter_add_pages  Adds gradients of groups to a pool of pages, group by group.
SmlmPlan           The work list of a step: which rows belong to which adapter.
build_plan         Builds an SmlmPlan from segments of rows, on the host.
plan_shapes        Shapes of an SmlmPlan, to compile ahead of time.
paged_attention    Causal attention over a paged KV cache, for prefill chunks and decode rows.
AttentionPlan      The work list of paged_attention: blocks of rows, and where their keys are.
pack_attention     Causal attention inside packs of samples; differentiable.
"""

from pallas_kernels.pack_attention import pack_attention
from pallas_kernels.page_scatter import scatter_add_pages
from pallas_kernels.paged_attention import AttentionPlan, paged_attention
from pallas_kernels.smlm import SmlmPlan, build_plan, plan_shapes, smlm, smlm_bwd, smlm_fwd
from pallas_kernels.smlm_glu import smlm_glu

__all__ = [
    "AttentionPlan",
    "SmlmPlan",
    "build_plan",
    "pack_attention",
    "paged_attention",
    "plan_shapes",
    "scatter_add_pages",
    "smlm",
    "smlm_bwd",
    "smlm_fwd",
    "smlm_glu",
]
