"""The first half of a gated MLP with adapters: gate and up with their deltas, then act(gate) * up."""

from pallas_kernels.smlm_glu.api import smlm_glu

__all__ = ["smlm_glu"]
