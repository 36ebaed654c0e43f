"""A gated MLP's first half under adapters: gate and up with their deltas, and act(gate) * up."""

from pallas_kernels.smlm_glu.api import smlm_glu

__all__ = ["smlm_glu"]
