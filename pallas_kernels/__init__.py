"""The kernels of loquetier_jax: one folder per op, knowing nothing of the runtime.

smlm               The LoRA delta of every row under its own adapter, added to y; differentiable.
smlm_fwd           Its forward, and what its backward needs of the rows that train.
smlm_bwd           Its backward: gradients of x, and of A and B for each pack by itself.
smlm_glu           The same delta of gate and up, and act(gate) * up.
scatter_add_pages  Gradients of groups added to a pool of pages, one group after the other.
SmlmPlan           Which rows belong to which adapter: the work list of a step.
build_plan         That plan, from segments of rows, on the host.
plan_shapes        Its shapes, to compile ahead of time.
paged_attention    Causal attention over a paged KV cache, for prefill chunks and decode rows.
AttentionPlan      Where the keys of its rows lie.
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
