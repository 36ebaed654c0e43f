"""Packs samples, as a pure function of (data, config, cursor), so that a job can resume at any pack."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, UInt32

from loquetier_jax.batch.packs import SAMPLE_ALIGN, Pack, aligned, rows_of
from loquetier_jax.config import require
from loquetier_jax.train.config import TrainConfig
from loquetier_jax.train.data import Dataset, Sample

EVAL_WINDOW = 256  # evaluation samples packed together


@dataclass(frozen=True)
class Cursor:
    """The next pack of a job, as plain numbers for checkpoints.

    Attributes:
        step: Optimizer step, from 0.
        pack: Pack within that step, from 0.
    """

    step: int = 0
    pack: int = 0

    def to_dict(self) -> dict[str, int]:
        """JSON data."""
        return asdict(self)


class PackStream:
    """The packs of a job. Has no position: every method is a pure function of its arguments.

    Args:
        data: The job's samples.
        cfg: Provides seed, shuffle, batch sizes and pack_tokens.
    """

    def __init__(self, data: Dataset, cfg: TrainConfig) -> None:
        self.data = data
        self.cfg = cfg
        self.steps_per_epoch = cfg.steps_per_epoch(data.num_groups)
        self.total_steps = cfg.total_steps(data.num_groups)
        self._cached_order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        self._cached_bins: tuple[int, list[list[int]]] = (-1, [])

    def epoch(self, step: int) -> int:
        """The epoch that an optimizer step belongs to, from 0."""
        return step // self.steps_per_epoch

    def epochs_done(self, steps: int) -> float:
        """Passes over the data completed after `steps` optimizer steps; fractional within a pass."""
        whole, part = divmod(steps, self.steps_per_epoch)
        return whole + part * self.cfg.samples_per_step / self.data.num_groups

    def order(self, epoch: int) -> Int[np.ndarray, " n"]:
        """The order of the sample groups in an epoch; depends only on (seed, epoch)."""
        if self._cached_order[0] != epoch:
            count = self.data.num_groups
            random = np.random.Generator(np.random.Philox(key=[self.cfg.seed, epoch]))
            self._cached_order = (epoch, random.permutation(count) if self.cfg.shuffle else np.arange(count))
        return self._cached_order[1]

    def samples_of(self, step: int) -> list[int]:
        """Indices of the samples of one optimizer step in the data."""
        size, of_group = self.cfg.samples_per_step, self.data.group_size
        start = (step % self.steps_per_epoch) * size
        groups = self.order(self.epoch(step))[start : start + size]
        return [int(g) * of_group + i for g in groups for i in range(of_group)]

    def packs_in_step(self, step: int) -> int:
        """Number of packs of an optimizer step."""
        return len(self._bins(step))

    def pack(self, cursor: Cursor) -> Pack:
        """The pack at a cursor."""
        bins = self._bins(cursor.step)
        require(0 <= cursor.pack < len(bins), "cursor.pack", cursor.pack, f"an index below {len(bins)}")
        return build_pack(
            self.data.samples,
            bins[cursor.pack],
            self.cfg.pack_rows,
            seed=self.cfg.seed,
            step=cursor.step,
            index=cursor.pack,
            is_last=cursor.pack + 1 == len(bins),
        )

    def after(self, cursor: Cursor) -> Cursor:
        """The cursor that follows."""
        last = cursor.pack + 1 >= self.packs_in_step(cursor.step)
        return Cursor(cursor.step + 1) if last else replace(cursor, pack=cursor.pack + 1)

    def iterate(self, cursor: Cursor | None = None) -> Iterator[Pack]:
        """All packs from a cursor to the end of the job."""
        cursor = cursor or Cursor()
        while cursor.step < self.total_steps:
            yield self.pack(cursor)
            cursor = self.after(cursor)

    def _bins(self, step: int) -> list[list[int]]:
        if self._cached_bins[0] != step:
            self._cached_bins = (
                step,
                first_fit(self.data.samples, self.samples_of(step), self.cfg.pack_rows, self.data.group_size),
            )
        return self._cached_bins[1]


def eval_packs(data: Dataset, cfg: TrainConfig) -> list[tuple[int, ...]]:
    """Sample indices of each evaluation pack, in the order of the data, for `build_pack`."""
    size = data.group_size
    window = max(EVAL_WINDOW // size, 1) * size
    windows = (range(i, min(i + window, len(data))) for i in range(0, len(data), window))
    return [tuple(b) for ids in windows for b in first_fit(data.samples, ids, cfg.pack_rows, size)]


def first_fit(
    samples: Sequence[Sample], ids: Sequence[int], pack_tokens: int, group_size: int = 1
) -> list[list[int]]:
    """Puts each group of samples into the first pack with room for all of it, in order.

    Args:
        samples: All samples.
        ids: Indices of those to pack, in order.
        pack_tokens: Rows of a pack; no group takes more.
        group_size: Number of consecutive ids that form a group.

    Returns:
        Sample indices of each pack.
    """
    bins: list[list[int]] = []
    used: list[int] = []
    for first in range(0, len(ids), group_size):
        group = ids[first : first + group_size]
        rows = rows_of([samples[i] for i in group])
        where = next((b for b, u in enumerate(used) if u + rows <= pack_tokens), None)
        if where is None:
            where = len(bins)
            bins.append([])
            used.append(0)
        bins[where].extend(group)
        used[where] += aligned(rows)
    return bins


def build_pack(
    samples: Sequence[Sample],
    ids: Sequence[int],
    pack_tokens: int,
    *,
    seed: int = 0,
    step: int = 0,
    index: int = 0,
    is_last: bool = True,
) -> Pack:
    """Concatenates samples into a pack, each starting on a SAMPLE_ALIGN boundary.

    Args:
        samples: All samples.
        ids: Indices of those in the pack; they must fit together (see `first_fit`).
        pack_tokens: L, rows of the pack.
        seed, step: For the dropout keys.
        index, is_last: Copied into the pack.

    Returns:
        A pack with new arrays.
    """
    rows: dict[str, Any] = {k: np.zeros(pack_tokens, np.int32) for k in ("tokens", "targets", "positions")}
    rows["segments"] = np.full(pack_tokens, -1, np.int32)
    rows["weights"] = np.zeros(pack_tokens, np.float32)
    rows["drop_keys"] = np.zeros(pack_tokens, np.uint32)
    start = 0
    for segment, i in enumerate(ids):
        sample = samples[i]
        at = slice(start, start + len(sample))
        positions = np.arange(len(sample), dtype=np.int32)
        rows["tokens"][at], rows["targets"][at] = sample.tokens, sample.targets
        rows["weights"][at], rows["positions"][at], rows["segments"][at] = sample.weights, positions, segment
        rows["drop_keys"][at] = drop_keys(seed, step, i, positions)
        start += aligned(len(sample))
    return Pack(
        **rows,
        extras=_extras([samples[i] for i in ids], pack_tokens),
        num_targets=int(np.count_nonzero(rows["weights"])),
        num_tokens=sum(len(samples[i]) for i in ids),
        step=step,
        index=index,
        is_last=is_last,
        sample_ids=tuple(ids),
    )


def _extras(samples: Sequence[Sample], pack_tokens: int) -> dict[str, Float32[np.ndarray, " n"]]:
    """The samples' extras: per-row values at the samples' rows, per-sample values in sample order."""
    out: dict[str, np.ndarray] = {}
    for name, value in samples[0].extras.items():
        out[name] = np.zeros(pack_tokens if np.ndim(value) else pack_tokens // SAMPLE_ALIGN, np.float32)
    start = 0
    for place, sample in enumerate(samples):
        for name, value in sample.extras.items():
            out[name][slice(start, start + len(sample)) if np.ndim(value) else place] = value
        start += aligned(len(sample))
    return out


def drop_keys(
    seed: int, step: int, sample: int, positions: Int[np.ndarray, " n"]
) -> UInt32[np.ndarray, " n"]:
    """Hash of (job seed, optimizer step, sample, position), mixed with murmur3's 32-bit finalizer.

    Depends on nothing else, so that a row drops the same inputs in any batch.
    """
    key = np.zeros(1, np.uint32)
    for number in (seed, step, sample):
        key = _mix(key ^ np.uint32(number & 0xFFFFFFFF)) + np.uint32(0x9E3779B9)
    return _mix(key ^ positions.astype(np.uint32))


def _mix(h: UInt32[np.ndarray, " n"]) -> UInt32[np.ndarray, " n"]:
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))
