"""Packs are a pure function of data, config and cursor; every target is in exactly one of them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loquetier_jax.batch.packs import SAMPLE_ALIGN
from loquetier_jax.errors import ConfigError, DataError
from loquetier_jax.train.config import TrainConfig
from loquetier_jax.train.data import Dataset, load_dataset, make_sample
from loquetier_jax.train.packing import Cursor, PackStream, build_pack, drop_keys, eval_packs

ROWS = ("tokens", "targets", "positions", "segments", "weights", "drop_keys")


def dataset(lengths):
    starts = np.cumsum([1, *(n + 1 for n in lengths)])
    samples = [
        make_sample(np.arange(s, s + n + 1), np.ones(n + 1)) for s, n in zip(starts, lengths, strict=False)
    ]
    return Dataset("made", tuple(samples))


def same(a, b):
    return all(np.array_equal(getattr(a, r), getattr(b, r)) for r in ROWS) and all(
        getattr(a, f) == getattr(b, f)
        for f in ("num_targets", "num_tokens", "step", "index", "is_last", "sample_ids")
    )


jobs = st.builds(
    lambda lengths, **kw: (dataset(lengths), TrainConfig(pack_tokens=128, **kw)),
    st.lists(st.integers(1, 128), min_size=1, max_size=24),
    seed=st.integers(0, 2**32 - 1),
    per_device_train_batch_size=st.integers(1, 6),
    gradient_accumulation_steps=st.integers(1, 3),
    num_train_epochs=st.sampled_from([1, 2]),
    shuffle=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(jobs)
def test_every_target_once_an_epoch(job):
    data, cfg = job
    stream = PackStream(data, cfg)
    seen = {epoch: [] for epoch in range(int(cfg.num_train_epochs))}
    for pack in stream.iterate():
        assert all(len(getattr(pack, r)) == cfg.pack_tokens for r in ROWS)
        assert pack.num_targets == np.count_nonzero(pack.weights)
        assert pack.num_tokens == np.count_nonzero(pack.segments >= 0)
        seen[stream.epoch(pack.step)].extend(pack.targets[pack.weights > 0].tolist())
        for segment, sample in enumerate(pack.sample_ids):
            rows = np.flatnonzero(pack.segments == segment)
            assert rows[0] % SAMPLE_ALIGN == 0
            assert np.array_equal(pack.positions[rows], np.arange(len(data.samples[sample])))
            assert np.array_equal(pack.tokens[rows], data.samples[sample].tokens)
        padding = pack.segments < 0
        assert not any(getattr(pack, r)[padding].any() for r in ("tokens", "targets", "positions", "weights"))
    every = sorted(int(t) for s in data.samples for t in s.targets)
    assert all(sorted(targets) == every for targets in seen.values())


@settings(max_examples=40, deadline=None)
@given(jobs, st.data())
def test_resume_from_any_cursor(job, draw):
    data, cfg = job
    packs = list(PackStream(data, cfg).iterate())
    at = draw.draw(st.integers(0, len(packs) - 1))
    cursor = Cursor(**Cursor(packs[at].step, packs[at].index).to_dict())
    rest = list(PackStream(data, cfg).iterate(cursor))
    assert len(rest) == len(packs) - at
    assert all(same(a, b) for a, b in zip(rest, packs[at:], strict=True))


@settings(max_examples=40, deadline=None)
@given(jobs)
def test_steps_close_with_is_last(job):
    stream = PackStream(*job)
    packs = list(stream.iterate())
    assert sum(p.is_last for p in packs) == stream.total_steps
    for step in range(stream.total_steps):
        own = [p for p in packs if p.step == step]
        assert [p.index for p in own] == list(range(stream.packs_in_step(step)))
        assert [p.is_last for p in own] == [False] * (len(own) - 1) + [True]
        ids = [i for p in own for i in p.sample_ids]
        assert len(ids) <= stream.cfg.samples_per_step
        assert sorted(ids) == sorted(stream.samples_of(step))


def test_order_depends_on_seed_and_epoch_alone(make_data):
    data = make_data([3] * 50)
    cfg = TrainConfig(seed=1)
    first = PackStream(data, cfg).order(0)
    again = PackStream(data, replace(cfg, learning_rate=1.0, pack_tokens=64))
    again.order(5)
    assert np.array_equal(first, again.order(0))
    assert not np.array_equal(first, PackStream(data, cfg).order(1))
    assert not np.array_equal(first, PackStream(data, replace(cfg, seed=2)).order(0))
    assert np.array_equal(PackStream(data, replace(cfg, shuffle=False)).order(3), np.arange(50))


def test_drop_keys_know_nothing_of_the_pack(make_data):
    data = make_data([40, 20, 50])
    alone = build_pack(data.samples, [2], 128, seed=7, step=3)
    shared = build_pack(data.samples, [1, 2], 128, seed=7, step=3)
    assert np.array_equal(alone.drop_keys[:50], shared.drop_keys[32:82])
    base = drop_keys(7, 3, 2, np.arange(1000))
    assert len(np.unique(base)) > 998
    for other in (drop_keys(8, 3, 2, np.arange(1000)), drop_keys(7, 4, 2, np.arange(1000))):
        assert np.count_nonzero(base == other) < 3
    swapped = drop_keys(7, 2, 3, np.arange(1000))
    assert np.count_nonzero(base == swapped) < 3


def test_eval_packs_hold_everything_in_order(make_data):
    data = make_data([30, 100, 30, 64, 5])
    bins = eval_packs(data, TrainConfig(pack_tokens=128))
    assert bins == [(0, 2, 3), (1,), (4,)]
    packs = [build_pack(data.samples, b, 128) for b in bins]
    assert sum(p.num_targets for p in packs) == data.num_targets == 229


def test_epochs_done(make_data):
    stream = PackStream(make_data([4] * 10), TrainConfig(per_device_train_batch_size=4))
    assert [stream.epochs_done(s) for s in (0, 1, 3, 4)] == [0.0, 0.4, 1.0, 1.4]


def test_a_dataset_that_does_not_fit_is_refused(make_data):
    with pytest.raises(DataError, match=r"made\[1\].*200 rows"):
        load_dataset(make_data([5, 200]), None, TrainConfig(pack_tokens=128))
    with pytest.raises(ConfigError, match=r"cursor\.pack"):
        PackStream(make_data([5]), TrainConfig()).pack(Cursor(0, 1))
