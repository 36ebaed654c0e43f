"""Causal attention over a paged KV cache, for prefill chunks and decode rows."""

from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.paged_attention.plan import AttentionPlan
from pallas_kernels.paged_attention.ref import paged_attention_ref

__all__ = ["AttentionPlan", "paged_attention", "paged_attention_ref"]
