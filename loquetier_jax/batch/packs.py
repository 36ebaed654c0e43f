"""The unit of training, and of scoring: rows of several samples side by side. No jax."""

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32, Int32, UInt32

SAMPLE_ALIGN = 32  # a sample starts on such a row: its bits then do not depend on what shares the pack

ExtraNames = tuple[tuple[str, bool], ...]
"""What samples bring along for a loss of one's own: (name, whether there is a number per row), sorted."""


@dataclass(frozen=True, eq=False)
class Pack:
    """The unit of training: some samples of one job side by side in L = pack_tokens rows.

    Attributes:
        tokens, targets, positions: [L]; positions restart with each sample; all 0 on padding.
        segments: [L] which sample of the pack a row belongs to, -1 on padding.
        weights: [L] loss weights, 0 on padding and where there is no target.
        drop_keys: [L] hash of (job seed, optimizer step, sample, position): the dropout mask of a row.
        num_targets: Rows with a target.
        num_tokens: Rows that are not padding.
        step: Optimizer step the pack belongs to, from 0.
        index: Which pack of its step, from 0.
        is_last: Whether it is the last pack of its step.
        sample_ids: Index in the data of each segment's sample.
        extras: By name, [L] or [L / SAMPLE_ALIGN]: the samples' own, 0 on padding and beyond the last sample.
    """

    tokens: Int32[np.ndarray, " L"]
    targets: Int32[np.ndarray, " L"]
    positions: Int32[np.ndarray, " L"]
    segments: Int32[np.ndarray, " L"]
    weights: Float32[np.ndarray, " L"]
    drop_keys: UInt32[np.ndarray, " L"]
    num_targets: int
    num_tokens: int
    step: int
    index: int
    is_last: bool
    sample_ids: tuple[int, ...]
    extras: Mapping[str, Float32[np.ndarray, " n"]] = field(default_factory=dict)


def empty_extras(names: ExtraNames, packs: int, pack_rows: int) -> dict[str, Float32[np.ndarray, "G n"]]:
    """Zeros: [G, L] for an extra with a number per row, [G, S] for one with a number per sample."""
    sizes = {name: pack_rows if rows else pack_rows // SAMPLE_ALIGN for name, rows in names}
    return {name: np.zeros((packs, size), np.float32) for name, size in sizes.items()}


def pass_extras(
    names: ExtraNames, packs: Sequence[Pack], count: int, pack_rows: int
) -> dict[str, Float32[np.ndarray, "G n"]]:
    """The extras of the packs of a pass of `count`; zeros where there is no pack."""
    out = empty_extras(names, count, pack_rows)
    for name, array in out.items():
        for g, pack in enumerate(packs):
            array[g] = pack.extras[name]
    return out


def rows_of(samples: Sequence[Sized]) -> int:
    """Rows that samples take side by side; the last one is not filled up to SAMPLE_ALIGN."""
    return sum(aligned(len(sample)) for sample in samples[:-1]) + len(samples[-1])


def aligned(rows: int) -> int:
    """`rows`, filled up to a multiple of SAMPLE_ALIGN."""
    return -(-rows // SAMPLE_ALIGN) * SAMPLE_ALIGN
