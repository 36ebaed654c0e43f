"""A bucket list and a latency table shaped like a small GPU preset: 5 ms of weights, then about 20 us a row."""

import pytest

from loquetier_jax.config import Bucket
from loquetier_jax.schedule.latency import (
    BACKWARD,
    BACKWARD_SLICE,
    FORWARD,
    FORWARD_SLICE,
    OPTIMIZER,
    LatencyModel,
)
from loquetier_jax.schedule.types import SlicedShape

SLICES = 4


def bucket(text: str) -> Bucket:
    """ "train1x256 prefill64/4 decode8" to a Bucket."""
    fields: dict[str, int] = {}
    for part in text.split():
        if part.startswith("train"):
            fields["packs"], fields["pack_tokens"] = map(int, part[5:].split("x"))
        elif part.startswith("score"):
            fields["score_packs"], fields["score_tokens"] = map(int, part[5:].split("x"))
        elif part.startswith("prefill"):
            fields["prefill"], fields["chunks"] = map(int, part[7:].split("/"))
        elif part.startswith("decode"):
            fields["decode"] = int(part[6:])
    return Bucket(**fields)


LATTICE = (
    "decode4",
    "decode16",
    "prefill64/4 decode16",
    "prefill256/8 decode16",
    "train1x256 decode4",
    "train1x256 prefill64/4 decode16",
    "train1x256",
    "train4x256",
    "train2x512",
    "score1x512 decode16",
    "score2x256",
)


@pytest.fixture(scope="session")
def buckets() -> tuple[Bucket, ...]:
    return tuple(bucket(text) for text in LATTICE)


@pytest.fixture(scope="session")
def sliced() -> tuple[SlicedShape, ...]:
    return tuple(SlicedShape(packs=p, pack_tokens=t, slices=SLICES) for p, t in ((1, 256), (4, 256), (2, 512)))


def exact(buckets: tuple[Bucket, ...]) -> LatencyModel:
    """Every function of the bucket list, measured."""
    model = LatencyModel()
    for b in buckets:
        model.seed((FORWARD, b.name), [5 + 0.02 * b.rows], b.rows)
        if b.packs:
            shape = Bucket(packs=b.packs, pack_tokens=b.pack_tokens)
            rows = shape.rows
            model.seed((BACKWARD, shape.name), [5 + 0.04 * rows], rows)
            model.seed((BACKWARD_SLICE, shape.name), [(6 + 0.04 * rows) / SLICES], rows)
            model.seed((FORWARD_SLICE, shape.name), [(6 + 0.02 * rows) / SLICES], rows)
    model.seed((OPTIMIZER, "a"), [1.0], 1)
    return model


@pytest.fixture(scope="session")
def latency(buckets: tuple[Bucket, ...]) -> LatencyModel:
    return exact(buckets)


@pytest.fixture
def own_latency(buckets: tuple[Bucket, ...]) -> LatencyModel:
    """Like `latency`, for a test that changes it."""
    return exact(buckets)
