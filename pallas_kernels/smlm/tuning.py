"""Block sizes of the Triton kernels, by shape class and device."""

from dataclasses import dataclass

import jax.numpy as jnp

from pallas_kernels.smlm.plan import TILE, WIDE

MAX_SPANS = 16


@dataclass(frozen=True)
class SmlmConfig:
    """How the kernels cut one problem.

    Attributes:
        tile_rows: Rows of a program's tile: TILE (the plan's tiles) or WIDE (its wide tiles).
        fused: Shrink and expand in one launch (each program recomputes the shrink of its tile) or in two.
        programs_k: Programs that share the contraction of a shrink: a power of two, at most the number of
            spans. It moves sums between programs, never their order.
        block_k: Inputs per step of the shrink, of each span.
        block_n: Outputs per program of the expand.
        shrink_warps, shrink_stages, expand_warps, expand_stages: Triton's; a fused launch uses the shrink's.
    """

    tile_rows: int = TILE
    fused: bool = False
    programs_k: int = 8
    block_k: int = 128
    block_n: int = 256
    shrink_warps: int = 4
    shrink_stages: int = 3
    expand_warps: int = 4
    expand_stages: int = 2


def num_spans(in_features: int) -> int:
    """Stretches that a contraction is cut into; their sums are added as a binary tree.

    A function of the input size alone: a row's sum has one order whatever the launch looks like.
    """
    spans = 1
    while spans < MAX_SPANS and in_features // (2 * spans) >= 512:
        spans *= 2
    return spans


def default_config(in_features: int, rows: int, max_pages: int, dtype: jnp.dtype) -> SmlmConfig:
    """The configuration of a shape class, sound on any device.

    Args:
        in_features: Contraction size.
        rows: T, rows of the step; few rows are decode.
        max_pages: MP of the plan.
        dtype: Of x, A and B.
    """
    spans = num_spans(in_features)
    if jnp.dtype(dtype).itemsize > 2:  # float32: no tensor cores, twice the bytes
        return SmlmConfig(programs_k=spans, block_k=32, block_n=64, shrink_stages=2, expand_stages=1)
    if rows <= 512:
        return SmlmConfig(programs_k=spans, block_k=256 if max_pages == 1 else 128, block_n=256)
    return SmlmConfig(tile_rows=WIDE, programs_k=spans // 2 or 1, block_k=64, block_n=256, expand_warps=8)
