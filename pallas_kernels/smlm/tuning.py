"""Block sizes of the Triton kernels, by shape class and device."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from pallas_kernels.smlm.plan import TILE, WIDE

MAX_SPANS = 16
FEW_ROWS = 64  # up to which the kernels of a delta pay beside the base GEMM (measured: 32 yes, 128 no)
MAX_DECODE_ROWS = 512
MAX_NARROW = 8192  # outputs up to which adding the parts up in every block costs less than a round trip for it
MAX_SHARED_BYTES = 200 * 1024  # of the 227 KB that a block may take on Hopper
UNTUNED_SHARED_BYTES = 90 * 1024  # of the 99 KB that a block may take on any GPU since Ampere


@dataclass(frozen=True)
class SmlmConfig:
    """How the kernels cut one problem. No field moves a sum out of its order: results have the same bits.

    Attributes:
        tile_rows: Rows of a program's tile: TILE (the plan's tiles) or WIDE (its wide tiles).
        reduce: The last program of a tile to shrink adds the partial sums up, once; otherwise every program of
            the expand does, which saves a memory round trip where those are few.
        early: Each kernel lets the next be placed on the GPU while it runs itself: needs sm_90.
        group: Pages that one product takes side by side, a power of two.
        branch: A tile of one page has code of its own, of 16 ranks, beside that for `group` pages.
        programs_k: Programs that share the contraction of a shrink: a power of two, at most the number of spans.
        block_k: Inputs per step of the shrink, of each span.
        block_n: Outputs per program of the expand.
        shrink_warps, shrink_stages, expand_warps, expand_stages: Triton's.
    """

    tile_rows: int = TILE
    reduce: bool = False
    early: bool = False
    group: int = 4
    branch: bool = True
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


# The tuner's best by shape class: few rows (decode) or many, narrow outputs or wide ones, one page or several.
_HOPPER = {
    "few": SmlmConfig(early=True, programs_k=MAX_SPANS, block_k=256, shrink_warps=2, expand_warps=8),
    "few, pages": SmlmConfig(early=True, programs_k=MAX_SPANS, expand_warps=8),
    "many": SmlmConfig(WIDE, reduce=True, early=True, programs_k=4, block_n=128),
    "many, narrow": SmlmConfig(WIDE, early=True, programs_k=4, block_n=128),
    "many, pages": SmlmConfig(WIDE, reduce=True, early=True, branch=False, programs_k=4, block_n=128),
}
TUNED = {"NVIDIA H200": _HOPPER, "NVIDIA H100 80GB HBM3": _HOPPER}  # one processor; the H200 was measured
# For devices that nobody tuned on.
UNTUNED = {name: replace(config, early=False, shrink_stages=2) for name, config in _HOPPER.items()}
FLOAT32 = SmlmConfig(programs_k=MAX_SPANS, block_k=32, block_n=64, shrink_stages=2, expand_stages=1)


def device_kind() -> str:
    """What TUNED is keyed by: the kind of the first device."""
    return jax.devices()[0].device_kind


def shape_class(rows: int, out_features: tuple[int, ...], max_pages: int) -> str:
    """The row of a device's table."""
    if max_pages > 1:
        return "few, pages" if rows <= MAX_DECODE_ROWS else "many, pages"
    if rows <= MAX_DECODE_ROWS:
        return "few"
    return "many, narrow" if sum(out_features) <= MAX_NARROW else "many"


def smlm_config(
    rows: int,
    in_features: int,
    out_features: tuple[int, ...],
    max_pages: int,
    dtype: jnp.dtype,
    kind: str | None = None,
) -> SmlmConfig:
    """The configuration of a shape class on a device.

    Args:
        rows: T, rows of the step; few rows are decode.
        in_features: Contraction size.
        out_features: Columns of each target.
        max_pages: MP of the plan.
        dtype: Of x, A and B.
        kind: Of the device; by default that of the first one.
    """
    spans, targets = num_spans(in_features), len(out_features)
    if jnp.dtype(dtype).itemsize > 2:  # float32: no tensor cores, twice the bytes
        return replace(FLOAT32, programs_k=spans)
    tuned = TUNED.get(device_kind() if kind is None else kind)
    limit = MAX_SHARED_BYTES if tuned else UNTUNED_SHARED_BYTES
    config = (tuned or UNTUNED)[shape_class(rows, out_features, max_pages)]
    config = replace(config, programs_k=min(spans, config.programs_k))
    ranks = targets * min(max_pages, config.group) * 16
    while _shared_bytes(config, ranks, spans) > limit and config.block_k > 16:
        config = replace(config, block_k=config.block_k // 2)
    return config


def _shared_bytes(config: SmlmConfig, ranks: int, spans: int) -> int:
    """Shared memory of a 2-byte shrink: x and A of every span that a program advances, times the stages."""
    blocks = (config.tile_rows + ranks) * config.block_k * (spans // config.programs_k)
    return 2 * blocks * config.shrink_stages
