"""Packs, the unit of training and scoring: several samples concatenated in one block of rows. No jax."""

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32, Int32, UInt32

SAMPLE_ALIGN = 32  # samples start on multiples of this, so that their bits do not depend on the rest of the pack

ExtraNames = tuple[tuple[str, bool], ...]
"""Extra inputs of custom losses: (name, True for a number per row or False for one per sample), sorted."""


@dataclass(frozen=True, eq=False)
class Pack:
    """The unit of training: samples of one job, concatenated in L = pack_tokens rows.

    Attributes:
        tokens, targets, positions: [L]; positions restart with each sample; all 0 on padding.
        segments: [L] index of the row's sample within the pack, -1 on padding.
        weights: [L] loss weights, 0 on padding and where there is no target.
        drop_keys: [L] hash of (job seed, optimizer step, sample, position), which seeds a row's dropout mask.
        num_targets: Number of rows with a target.
        num_tokens: Number of rows that are not padding.
        step: Optimizer step the pack belongs to, from 0.
        index: Index of the pack within its step, from 0.
        is_last: Whether it is the last pack of its step.
        sample_ids: Per segment, the index of its sample in the dataset.
        extras: Name -> [L] or [L / SAMPLE_ALIGN]: the samples' extras, 0 on padding and beyond the last sample.
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
    """Zeros: [packs, L] for a per-row extra, [packs, L / SAMPLE_ALIGN] for a per-sample one (L = pack_rows)."""
    sizes = {name: pack_rows if rows else pack_rows // SAMPLE_ALIGN for name, rows in names}
    return {name: np.zeros((packs, size), np.float32) for name, size in sizes.items()}


def pass_extras(
    names: ExtraNames, packs: Sequence[Pack], count: int, pack_rows: int
) -> dict[str, Float32[np.ndarray, "G n"]]:
    """The extras of the packs of a micro-step, stacked to `count` packs; zeros for missing packs."""
    out = empty_extras(names, count, pack_rows)
    for name, array in out.items():
        for g, pack in enumerate(packs):
            array[g] = pack.extras[name]
    return out


def rows_of(samples: Sequence[Sized]) -> int:
    """Rows that concatenated samples take; all but the last are padded to SAMPLE_ALIGN."""
    return sum(aligned(len(sample)) for sample in samples[:-1]) + len(samples[-1])


def aligned(rows: int) -> int:
    """`rows` rounded up to a multiple of SAMPLE_ALIGN."""
    return -(-rows // SAMPLE_ALIGN) * SAMPLE_ALIGN
