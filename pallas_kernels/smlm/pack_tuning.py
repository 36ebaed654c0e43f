"""How the Triton backward of packs is cut."""

from dataclasses import dataclass, replace

import jax.numpy as jnp

from pallas_kernels.smlm.plan import RANK_PAGE

MAX_SHARED_BYTES = 160 * 1024  # what a block may take on Ampere; Hopper has more
MAX_RANKS = 128  # ranks that the sums of one program hold


@dataclass(frozen=True)
class Block:
    """How one kind of work is cut.

    Attributes:
        rows: Rows of a tile.
        columns: Columns that a program takes at a time.
        span: Columns that a program takes in all, where it goes through several; 0: one block of columns.
    """

    rows: int
    columns: int
    span: int = 0


@dataclass(frozen=True)
class PackConfig:
    """How the two launches are cut.

    Attributes:
        dB, dS: Work of the first launch; the span of dS decides the order of its sums.
        dA, dX: Work of the second.
        turns: Pieces of each kind of work of the first launch that come by turns.
        first_warps, first_stages, second_warps, second_stages: Triton's.
    """

    dB: Block = Block(64, 64)
    dS: Block = Block(64, 64, 512)
    dA: Block = Block(64, 64)
    dX: Block = Block(64, 64, 256)
    first_warps: int = 4
    first_stages: int = 4
    second_warps: int = 4
    second_stages: int = 4
    turns: int = 1


def default_pack_config(rows: int, out_features: tuple[int, ...], pages: int, dtype: jnp.dtype) -> PackConfig:
    """The configuration of a shape class, tuned on an H200, of moderate shared memory anywhere.

    Args:
        rows: Of all packs: G * L. Few rows are few programs, each of which must have more loads under way.
        out_features: Columns of each target. Of many, dS has fewer shares, each of more columns.
        pages: MP.
        dtype: Of x.
    """
    few, wide = rows <= 1024, sum(out_features) > 8192
    config = PackConfig()
    if jnp.dtype(dtype).itemsize > 2:  # float32: twice the bytes, no wgmma
        config = PackConfig(Block(32, 32), Block(32, 32, 512), Block(32, 32), Block(32, 32, 32), 4, 2, 4, 2)
    elif wide and few:
        config = replace(config, dS=Block(64, 64, 1024), first_stages=3)
    elif wide:
        config = replace(config, dB=Block(32, 128), dS=Block(64, 64, 1024), first_stages=5)
    ranks = min(MAX_RANKS, pages * RANK_PAGE)
    while config.first_stages > 1 and shared_bytes(config, ranks, ranks, dtype)[0] > MAX_SHARED_BYTES:
        config = replace(config, first_stages=config.first_stages - 1)
    stacked = len(out_features) * pages * RANK_PAGE
    if stacked > 2 * MAX_RANKS:  # dX holds all ranks of its rows: fewer rows, and no loop to load ahead for
        config = replace(config, dX=Block(config.dX.rows // 2, config.dX.columns, config.dX.columns))
    while config.second_stages > 1 and shared_bytes(config, ranks, stacked, dtype)[1] > MAX_SHARED_BYTES:
        config = replace(config, second_stages=config.second_stages - 1)
    return config


def shared_bytes(config: PackConfig, ranks: int, stacked: int, dtype: jnp.dtype) -> tuple[int, int]:
    """Shared memory of the two launches: what a turn of a loop loads, times the stages.

    Args:
        config: The configuration.
        ranks: Ranks that a column of dY meets, at most MAX_RANKS.
        stacked: Ranks of all targets.
        dtype: Of x.
    """
    dB, dS, dA, dX = config.dB, config.dS, config.dA, config.dX
    first = max(dB.rows * (dB.columns + ranks), dS.columns * (dS.rows + ranks)) * config.first_stages
    second = dA.rows * (dA.columns + min(MAX_RANKS, stacked)) * config.second_stages
    turns = config.second_stages if dX.span > dX.columns else 1  # one block of columns is no loop
    second = max(second, stacked * (dX.rows + dX.columns * turns))
    return jnp.dtype(dtype).itemsize * first, jnp.dtype(dtype).itemsize * second
