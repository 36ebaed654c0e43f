"""Block sizes of the Triton kernels, by shape class and device."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from pallas_kernels.smlm.plan import TILE, WIDE

MAX_SPANS = 16
FEW_ROWS = 64  # up to here, running the delta concurrently with the base GEMM pays off (measured: 32 yes, 128 no)
MAX_DECODE_ROWS = 512
MAX_NARROW = 8192  # up to so many outputs, adding the parts in every block costs less than a memory round trip
MAX_SHARED_BYTES = 200 * 1024  # of the 227 KB available to a block on Hopper
UNTUNED_SHARED_BYTES = 90 * 1024  # of the 99 KB available to a block on any GPU since Ampere


@dataclass(frozen=True)
class SmlmConfig:
    """Block sizes and options of the kernels. They do not affect the order of sums: results are bit-identical.

    Attributes:
        tile_rows: Rows of a program's tile: TILE (the plan's tiles) or WIDE (its wide tiles).
        reduce: Whether the last shrink program of a tile adds up the partial sums once; otherwise every expand
            program does, which saves a memory round trip if there are few of them.
        early: Whether each kernel lets the next be scheduled while it runs; needs sm_90.
        group: Pages handled by one product, a power of two.
        branch: Whether tiles with one page use separate code for 16 ranks instead of that for `group` pages.
        programs_k: Programs that share the contraction of a shrink: a power of two, at most the number of spans.
        block_k: Inputs per step of the shrink, in each span.
        block_n: Outputs per program of the expand.
        shrink_warps, shrink_stages, expand_warps, expand_stages: Triton's num_warps and num_stages.
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
    """Number of spans that a contraction is split into; their sums are added as a binary tree.

    Depends only on the input size, so that a row's sum has the same order in every launch.
    """
    spans = 1
    while spans < MAX_SPANS and in_features // (2 * spans) >= 512:
        spans *= 2
    return spans


# Autotuning results by shape class: few rows (decode) or many, narrow or wide outputs, one page or several.
_HOPPER = {
    "few": SmlmConfig(early=True, programs_k=MAX_SPANS, block_k=256, shrink_warps=2, expand_warps=8),
    "few, pages": SmlmConfig(early=True, programs_k=MAX_SPANS, expand_warps=8),
    "many": SmlmConfig(WIDE, reduce=True, early=True, programs_k=4, block_n=128),
    "many, narrow": SmlmConfig(WIDE, early=True, programs_k=4, block_n=128),
    "many, pages": SmlmConfig(WIDE, reduce=True, early=True, branch=False, programs_k=4, block_n=128),
}
TUNED = {"NVIDIA H200": _HOPPER, "NVIDIA H100 80GB HBM3": _HOPPER}  # the same GPU chip; tuned on the H200
# For devices without tuning results.
UNTUNED = {name: replace(config, early=False, shrink_stages=2) for name, config in _HOPPER.items()}
FLOAT32 = SmlmConfig(programs_k=MAX_SPANS, block_k=32, block_n=64, shrink_stages=2, expand_stages=1)


def device_kind() -> str:
    """The kind of the first device, a key of TUNED."""
    return jax.devices()[0].device_kind


def shape_class(rows: int, out_features: tuple[int, ...], max_pages: int) -> str:
    """The key into a device's table."""
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
        rows: T, rows of the step; few rows mean decode.
        in_features: Contraction size.
        out_features: Columns of each target.
        max_pages: MP of the plan.
        dtype: Dtype of x, A and B.
        kind: Kind of the device; by default that of the first device.
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
    """Shared memory of a 2-byte shrink: blocks of x and A of every span of a program, times the stages."""
    blocks = (config.tile_rows + ranks) * config.block_k * (spans // config.programs_k)
    return 2 * blocks * config.shrink_stages
