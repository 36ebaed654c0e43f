"""Checks that samples fit a job and a model: arrays, lengths, token ids and extras."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from loquetier_jax.batch.packs import ExtraNames, rows_of
from loquetier_jax.errors import DataError, short
from loquetier_jax.train.config import TrainConfig


def check_token_ids(sample: Any, vocab_size: int | None, where: str, tokenizer: Any = None) -> None:
    """Raises DataError, naming the first bad id, unless all ids of a sample are in the model's vocabulary."""
    for ids in (sample.tokens, sample.targets):
        if not len(ids) or (ids.min() >= 0 and (vocab_size is None or ids.max() < vocab_size)):
            continue
        bad = int(next(i for i in ids if not 0 <= i < (vocab_size or 2**31)))
        token = None if tokenizer is None or bad < 0 else tokenizer.convert_ids_to_tokens(bad)
        text = "" if token is None else f" ({token!r})"
        raise DataError(f"{where}: got token id {bad}{text}, expected ids in [0, {vocab_size}), the model's vocabulary")


def check_samples_fit(samples: Sequence[Any], name: str, cfg: TrainConfig, vocab_size: int | None) -> None:
    """Raises DataError unless user-built samples fit a job's packs and the model's vocabulary."""
    if not samples:
        raise DataError(f"{name}: no records")
    rows = cfg.sample_tokens - 1
    for i, sample in enumerate(samples):
        where = f"{name}[{i}]"
        _check_arrays(sample, where)
        if len(sample) > rows or not np.any(sample.weights):
            limit = f"max_length - 1 = {rows}" if cfg.max_length else f"pack_tokens = {rows}"
            raise DataError(
                f"{where}: got {len(sample)} rows with {np.count_nonzero(sample.weights)} targets, "
                f"expected at most {limit} rows and at least one target"
            )
        check_token_ids(sample, vocab_size, where)


def _check_arrays(sample: Any, where: str) -> None:
    arrays = [getattr(sample, key, None) for key in ("tokens", "targets", "weights")]
    shapes = {getattr(array, "shape", None) for array in arrays}
    kinds = [getattr(getattr(array, "dtype", None), "kind", "?") for array in arrays]
    flat = len(shapes) == 1 and len(next(iter(shapes)) or ()) == 1
    if not flat or kinds[0] not in "iu" or kinds[1] not in "iu" or kinds[2] != "f":
        raise DataError(f"{where}: got {short(sample, 200)}, expected a Sample: three arrays of one length")
    weights = arrays[2]
    if bad := weights[~(np.isfinite(weights) & (weights >= 0))].tolist():
        raise DataError(f"{where}: weights: got {bad[0]}, expected a Sample whose weights are finite and not negative")


def extra_names(sample: Any) -> ExtraNames:
    """(name, True for a number per row or False for one per sample) of a sample's extras, sorted."""
    return tuple(sorted((name, np.ndim(value) == 1) for name, value in sample.extras.items()))


def check_samples(data: Any, pack_rows: int, *, own_loss: bool, like: Any | None = None) -> None:
    """Checks that a dataset meets the requirements of its loss and its packs.

    Args:
        data: The Dataset.
        pack_rows: Rows of a pack, which every group must fit.
        own_loss: Whether there is a custom loss, which can use extras.
        like: The training data, if `data` is its evaluation data; both must have the same extras and group size.

    Raises:
        DataError: names the sample and the problem.
    """
    for i, sample in enumerate(data.samples):
        _check_values(sample, f"{data.name}[{i}]")
    size, want = data.group_size, extra_names((like or data).samples[0])
    if like is not None and size != like.group_size:
        raise DataError(f"{data.name}: got group_size {size}, expected {like.group_size}, that of {like.name}")
    for i, sample in enumerate(data.samples):
        if (got := extra_names(sample)) != want:
            raise DataError(f"{data.name}[{i}]: got extras {_spell(got)}, expected {_spell(want)}")
    if want and not own_loss:
        expected = "none: cross-entropy does not use extras; pass a loss that does, TrainConfig(loss=...)"
        raise DataError(f"{data.name}: got extras {_spell(want)}, expected {expected}")
    for first in range(0, len(data), size):
        rows = rows_of(data.samples[first : first + size])
        if rows > pack_rows:
            raise DataError(
                f"{data.name}[{first}]: got a group of {size} samples that takes {rows} rows, expected at most "
                f"pack_tokens = {pack_rows}: they belong in one pack"
            )


def _check_values(sample: Any, where: str) -> None:
    for name, value in sample.extras.items():
        try:
            array = np.asarray(value)
        except ValueError:  # lists of several lengths
            array = np.empty(0, object)
        numbers = array.dtype.kind in "biuf" and array.shape in ((), (len(sample),))
        if not numbers or not np.isfinite(array).all():
            expected = f"one finite number, or one for each of its {len(sample)} rows"
            raise DataError(f"{where}: extras[{name!r}]: got {value!r:.80}, expected {expected}")


def _spell(names: ExtraNames) -> str:
    return ", ".join(f"{name} ({'per row' if rows else 'per sample'})" for name, rows in names) or "none"
