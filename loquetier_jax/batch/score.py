"""Token sequences to packs that are only scored: `log_probs`, `prompt_logprobs`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loquetier_jax.errors import RequestError
from loquetier_jax.jobs.data import Pack

ALIGN = 32  # a sequence starts on such a row, as a training sample does, so that its bits are the same


@dataclass(frozen=True)
class Place:
    """Where a sequence's scored tokens lie: rows [start, start + count) of packs[pack]; count = tokens - 1."""

    pack: int
    start: int
    count: int


def pack_sequences(sequences: Sequence[Sequence[int]], size: int) -> tuple[list[Pack], list[Place]]:
    """Lays sequences out in packs of `size` rows, in order.

    Args:
        sequences: Token ids; n tokens take n - 1 rows, the first token has no log-prob.
        size: Rows of a pack.

    Raises:
        RequestError: a sequence of fewer than 2 tokens, or one that no pack can hold.
    """
    fills: list[list[Sequence[int]]] = []
    places, used = [], size
    for i, ids in enumerate(sequences):
        rows = len(ids) - 1
        if not 1 <= rows <= size:
            raise RequestError(f"sequences[{i}]: got {len(ids)} tokens, expected 2 to {size + 1}")
        if used + rows > size:
            fills.append([])
            used = 0
        places.append(Place(len(fills) - 1, used, rows))
        fills[-1].append(ids)
        used += -(-rows // ALIGN) * ALIGN
    packs = [
        _pack(fill, [p for p in places if p.pack == number], size, number)
        for number, fill in enumerate(fills)
    ]
    return packs, places


def _pack(sequences: list[Sequence[int]], places: list[Place], size: int, number: int) -> Pack:
    rows = {name: np.zeros(size, np.int32) for name in ("tokens", "targets", "positions")}
    segments, weights = np.full(size, -1, np.int32), np.zeros(size, np.float32)
    for segment, (ids, place) in enumerate(zip(sequences, places, strict=True)):
        cut = slice(place.start, place.start + place.count)
        rows["tokens"][cut], rows["targets"][cut] = ids[:-1], ids[1:]
        rows["positions"][cut] = np.arange(place.count)
        segments[cut], weights[cut] = segment, 1.0
    scored = int(weights.sum())
    return Pack(
        **rows,
        segments=segments,
        weights=weights,
        drop_keys=np.zeros(size, np.uint32),
        num_targets=scored,
        num_tokens=scored,
        step=0,
        index=number,
        is_last=False,
        sample_ids=tuple(range(len(sequences))),
    )
