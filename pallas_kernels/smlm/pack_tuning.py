"""Block sizes of the Triton backward of packs."""

from dataclasses import dataclass, replace

import jax.numpy as jnp

from pallas_kernels.smlm.plan import RANK_PAGE, WIDE

MAX_SHARED_BYTES = 160 * 1024  # limit per block on Ampere; Hopper has more
MAX_RANKS = 128  # maximum ranks in the sums of one program


@dataclass(frozen=True)
class Block:
    """How one kind of work is split.

    Attributes:
        rows: Rows of a tile.
        columns: Columns that a program handles at a time.
        span: Columns that a program handles in total, if it loops; 0 for a single block of columns.
    """

    rows: int
    columns: int
    span: int = 0


@dataclass(frozen=True)
class DyConfig:
    """Block sizes of the launch that reads dY.

    Attributes:
        dB, dS: Its two kinds of work; the span of dS determines the order of its sums.
        warps, stages: Triton's num_warps and num_stages.
        turns: Number of pieces of each kind of work, which alternate.
    """

    dB: Block = Block(64, 64)
    dS: Block = Block(64, 64, 512)
    warps: int = 4
    stages: int = 3
    turns: int = 1

    def shared_bytes(self, ranks: int, dtype: jnp.dtype) -> int:
        """Shared memory in bytes: the loads of a loop iteration, times the stages.

        Args:
            ranks: Ranks per column of dY.
            dtype: Dtype of dY.
        """
        ranks = min(MAX_RANKS, ranks)
        most = max(self.dB.rows * (self.dB.columns + ranks), self.dS.columns * (self.dS.rows + ranks))
        return jnp.dtype(dtype).itemsize * most * self.stages


@dataclass(frozen=True)
class XConfig:
    """Block sizes of the launch that reads x.

    Attributes:
        dA, dX: Its two kinds of work.
        warps, stages: Triton's num_warps and num_stages.
    """

    dA: Block = Block(64, 64)
    dX: Block = Block(64, 64, 256)
    warps: int = 4
    stages: int = 4

    def shared_bytes(self, ranks: int, dtype: jnp.dtype) -> int:
        """Shared memory in bytes, likewise.

        Args:
            ranks: Ranks of all targets.
            dtype: Dtype of x.
        """
        turns = self.stages if self.dX.span > self.dX.columns else 1  # a single block of columns does not loop
        most = self.dA.rows * (self.dA.columns + min(MAX_RANKS, ranks)) * self.stages
        most = max(most, ranks * self.dX.rows + (ranks + self.dX.rows) * self.dX.columns * turns)
        return jnp.dtype(dtype).itemsize * most


@dataclass(frozen=True)
class GluConfig:
    """Block sizes of the launch with a gated activation.

    Attributes:
        block: Rows that a program handles at a time, and its columns.
        parts: Programs that share the rows of a block of columns; dA is the sum of their results.
        warps, stages: Triton's num_warps and num_stages.
    """

    block: Block
    parts: int = 1
    warps: int = 4
    stages: int = 3


def default_dy_config(
    packs: int, rows: int, out_features: tuple[int, ...], pages: int, dtype: jnp.dtype
) -> DyConfig:
    """The configuration of a shape class, tuned on an H200, with moderate shared memory on any device.

    Args:
        packs: G; never affects the order of sums.
        rows: L, rows of a pack.
        out_features: Columns of each target. With many columns, dS has fewer partial sums over more columns each.
        pages: MP.
        dtype: Dtype of dY.
    """
    if jnp.dtype(dtype).itemsize > 2:  # float32: twice the bytes, no wgmma
        config = DyConfig(Block(32, 32), Block(32, 32, 512), stages=2)
    elif sum(out_features) <= 8192:
        config = DyConfig()
    elif rows <= 1024:
        config = DyConfig(Block(64, 128), Block(128, 64, 1024), turns=2 if packs == 1 else 28)
    else:
        config = DyConfig(Block(128, 64), Block(64, 128, 1024), turns=28)
    while config.stages > 1 and config.shared_bytes(pages * RANK_PAGE, dtype) > MAX_SHARED_BYTES:
        config = replace(config, stages=config.stages - 1)
    return config


def default_runs_dy_config(out_features: tuple[int, ...], pages: int, dtype: jnp.dtype) -> DyConfig:
    """The configuration for runs of any length: dS is computed by wide tiles, dB by runs.

    Args:
        out_features, pages, dtype: As for `default_dy_config`.
    """
    config = default_dy_config(1, WIDE, out_features, pages, dtype)
    return replace(config, dS=replace(config.dS, rows=min(WIDE, config.dS.rows)), turns=1)


def default_x_config(ranks: int, dtype: jnp.dtype) -> XConfig:
    """The configuration of a shape class, likewise.

    Args:
        ranks: Ranks of all pages of all targets.
        dtype: Dtype of x.
    """
    config = XConfig()
    if jnp.dtype(dtype).itemsize > 2:
        config = XConfig(Block(32, 32), Block(32, 32, 32), stages=2)
    if ranks > 2 * MAX_RANKS:  # dX holds all ranks of its rows: use fewer rows and no pipelined loop
        config = replace(config, dX=Block(config.dX.rows // 2, config.dX.columns, config.dX.columns))
    while config.shared_bytes(ranks, dtype) > MAX_SHARED_BYTES:
        if config.stages > 1:
            config = replace(config, stages=config.stages - 1)
        else:
            rows, columns = config.dX.rows // 2, max(16, config.dX.columns // 2)
            config = replace(config, dX=Block(rows, columns, columns))
    return config


def default_glu_config(rows: int, ranks: int, dtype: jnp.dtype) -> GluConfig:
    """The configuration of a shape class, likewise.

    Args:
        rows: L, rows of a pack. With few rows, two programs share a block of columns, to have enough programs.
        ranks: Ranks of all pages.
        dtype: Dtype of gate and up.
    """
    if jnp.dtype(dtype).itemsize > 2 or ranks > MAX_RANKS:
        return GluConfig(Block(32, 32), stages=1)
    stages = 3 if ranks <= MAX_RANKS // 2 else 2
    return GluConfig(Block(32, 64), 2, stages=stages) if rows <= 1024 else GluConfig(Block(64, 64), stages=stages)
