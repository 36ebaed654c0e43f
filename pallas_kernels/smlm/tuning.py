"""Block sizes of the Triton kernels, by shape class and device."""

from dataclasses import dataclass, replace

import jax.numpy as jnp

from pallas_kernels.smlm.plan import TILE, WIDE

MAX_SPANS = 16
MAX_DECODE_ROWS = 512
MAX_SHARED_BYTES = 200 * 1024  # of the 227 KB that a block may take on Hopper


@dataclass(frozen=True)
class SmlmConfig:
    """How the kernels cut one problem. No field moves a sum out of its order: results have the same bits.

    Attributes:
        tile_rows: Rows of a program's tile: TILE (the plan's tiles) or WIDE (its wide tiles).
        reduce: The last program of a tile to shrink adds the partial sums up, once; otherwise every program of
            the expand does, which saves a memory round trip where those are few.
        programs_k: Programs that share the contraction of a shrink: a power of two, at most the number of spans.
        block_k: Inputs per step of the shrink, of each span.
        block_n: Outputs per program of the expand.
        shrink_warps, shrink_stages, expand_warps, expand_stages: Triton's.
    """

    tile_rows: int = TILE
    reduce: bool = False
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


def default_config(
    rows: int, in_features: int, out_features: tuple[int, ...], max_pages: int, dtype: jnp.dtype
) -> SmlmConfig:
    """The configuration of a shape class: tuned on an H200, of moderate shared memory anywhere.

    Args:
        rows: T, rows of the step; few rows are decode.
        in_features: Contraction size.
        out_features: Columns of each target.
        max_pages: MP of the plan.
        dtype: Of x, A and B.
    """
    spans, targets = num_spans(in_features), len(out_features)
    if jnp.dtype(dtype).itemsize > 2:  # float32: no tensor cores, twice the bytes
        return SmlmConfig(programs_k=spans, block_k=32, block_n=64, shrink_stages=2, expand_stages=1)
    if rows > MAX_DECODE_ROWS:
        config = SmlmConfig(tile_rows=WIDE, reduce=True, programs_k=max(1, spans // 2), block_n=128)
    elif sum(out_features) > 8192:
        config = SmlmConfig(programs_k=max(1, spans // 2), shrink_stages=4)
    else:
        config = SmlmConfig(programs_k=spans, block_k=256 if max_pages == 1 else 128)
    ranks = targets * min(max_pages, 4) * 16
    while _shared_bytes(config, ranks, spans) > MAX_SHARED_BYTES and config.block_k > 16:
        config = replace(config, block_k=config.block_k // 2)
    return config


def _shared_bytes(config: SmlmConfig, ranks: int, spans: int) -> int:
    """Shared memory of a 2-byte shrink: x and A of every span that a program advances, times the stages."""
    blocks = (config.tile_rows + ranks) * config.block_k * (spans // config.programs_k)
    return 2 * blocks * config.shrink_stages
