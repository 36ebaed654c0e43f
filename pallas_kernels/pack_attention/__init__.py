"""Causal attention inside packs of samples, for train and score rows."""

from pallas_kernels.pack_attention.api import pack_attention
from pallas_kernels.pack_attention.xla import PACK_ALIGN

__all__ = ["PACK_ALIGN", "pack_attention"]
