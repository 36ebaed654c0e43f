"""Samples that belong together, and what samples bring along: kept whole, shuffled as one, refused by name."""

from dataclasses import replace

import numpy as np
import pytest

from loquetier_jax.batch.packs import pass_extras, rows_of
from loquetier_jax.errors import DataError
from loquetier_jax.train.config import TrainConfig
from loquetier_jax.train.data import Dataset
from loquetier_jax.train.data_checks import check_samples
from loquetier_jax.train.packing import PackStream, build_pack, eval_packs, first_fit


def with_extras(data, **extras):
    """The same data; a function of the sample's number for each extra."""
    samples = [
        replace(sample, extras={name: np.float32(make(i, len(sample))) for name, make in extras.items()})
        for i, sample in enumerate(data.samples)
    ]
    return replace(data, samples=tuple(samples))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_groups_are_drawn_and_packed_whole(make_data, size):
    lengths = np.random.default_rng(size).integers(1, 60, 12 * size).tolist()
    data = replace(make_data(lengths), group_size=size)
    cfg = TrainConfig(per_device_train_batch_size=4, pack_tokens=192, num_train_epochs=2, gradient_accumulation_steps=2)
    stream = PackStream(data, cfg)
    assert (stream.steps_per_epoch, stream.total_steps, stream.epochs_done(3)) == (2, 4, 1 + 8 / 12)
    seen = []
    for pack in stream.iterate():
        groups = np.array(pack.sample_ids).reshape(-1, size)
        assert (groups % size == np.arange(size)).all() and (groups // size == groups[:, :1] // size).all()
        seen += groups[:, 0].tolist()
    assert seen != sorted(seen) and sorted(seen) == sorted(2 * list(range(0, 12 * size, size)))
    for ids in eval_packs(data, cfg):
        assert len(ids) % size == 0 and rows_of([data.samples[i] for i in ids]) <= 192


def test_a_pack_takes_a_group_only_if_all_of_it_fits(make_data):
    samples = make_data([60, 60, 60, 70, 3, 4]).samples
    assert first_fit(samples, range(6), 192, 2) == [[0, 1, 4, 5], [2, 3]]
    assert first_fit(samples, range(6), 192) == [[0, 1, 2], [3, 4, 5]]


def test_extras_lie_where_their_samples_are(make_data):
    data = with_extras(make_data([40, 33, 5]), row=lambda i, n: np.arange(n) + 100 * i, one=lambda i, n: -i)
    pack = build_pack(data.samples, (2, 0), 128, index=0)
    assert pack.extras["one"].tolist() == [-2, 0, 0, 0]
    assert pack.extras["row"].tolist() == [*range(200, 205), *[0] * 27, *range(40), *[0] * 56]
    two = pass_extras((("one", False), ("row", True)), [pack], 2, 128)
    assert {name: a.shape for name, a in two.items()} == {"one": (2, 4), "row": (2, 128)} and not two["row"][1].any()


def test_what_no_loss_can_use_is_refused(make_data):
    data, plain = with_extras(make_data([9, 4]), x=lambda i, n: np.ones(n)), make_data([9, 4])
    pairs = replace(make_data([100, 90]), group_size=2)
    one = with_extras(plain, x=lambda i, n: 1.0)
    mixed = Dataset("mixed", (data.samples[0], plain.samples[1]))
    short = with_extras(make_data([9, 4]), x=lambda i, n: np.ones(3))
    nan = with_extras(make_data([9, 4]), x=lambda i, n: np.nan)
    odd = [
        (replace(plain, samples=(replace(plain.samples[0], extras={"a": value}),)), {"own_loss": True}, got)
        for value, got in (("x", r"\['a'\]: got 'x'"), ([[1], [1, 2]], r"\['a'\]: got \[\[1\], "), (None, "got None"))
    ]
    refused = [
        *odd,
        (data, {"own_loss": False}, "extras x .per row., expected none: cross-entropy does not use extras"),
        (mixed, {"own_loss": True}, r"mixed\[1\]: got extras none, expected x \(per row\)"),
        (short, {"own_loss": True}, r"made\[0\]: extras\['x'\]: got .* one for each of its 9 rows"),
        (nan, {"own_loss": True}, r"made\[0\]: extras\['x'\]: got .*nan.*, expected one finite number"),
        (one, {"own_loss": True, "like": data}, r"got extras x \(per sample\), expected x \(per row\)"),
        (pairs, {"own_loss": True}, r"made\[0\]: got a group of 2 samples that takes 218 rows, .* pack_tokens = 128"),
        (plain, {"own_loss": False, "like": pairs}, "got group_size 1, expected 2, that of made"),
    ]
    for bad, how, message in refused:
        with pytest.raises(DataError, match=message):
            check_samples(bad, 128, **how)
    check_samples(data, 128, own_loss=True, like=data)
    check_samples(plain, 128, own_loss=False)
    for size in (0, 3, 1.5, True):
        with pytest.raises(DataError, match=f"made: group_size: got {size!r}, expected a divisor of 2 samples"):
            replace(plain, group_size=size)


def test_what_a_checkpoint_knows_of_its_data(make_data):
    """Extras and groups are part of it, as tokens are."""
    data = make_data([9, 4])
    some, other = (with_extras(data, x=lambda i, n, k=k: k * np.ones(n)) for k in (1, 2))
    prints = {d.fingerprint for d in (data, some, other, replace(data, group_size=2))}
    assert len(prints) == 4
    assert make_data([9, 4]).fingerprint == data.fingerprint
