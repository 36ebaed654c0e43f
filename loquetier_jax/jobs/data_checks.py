"""Whether samples fit a job and a model: their arrays, their lengths, their token ids."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from loquetier_jax.errors import DataError, short
from loquetier_jax.jobs.config import TrainConfig


def check_token_ids(sample: Any, vocab_size: int | None, where: str, tokenizer: Any = None) -> None:
    """Raises DataError, naming the first one, unless all ids of a sample are rows of the model's embedding."""
    for ids in (sample.tokens, sample.targets):
        if not len(ids) or (ids.min() >= 0 and (vocab_size is None or ids.max() < vocab_size)):
            continue
        bad = int(next(i for i in ids if not 0 <= i < (vocab_size or 2**31)))
        token = None if tokenizer is None or bad < 0 else tokenizer.convert_ids_to_tokens(bad)
        text = "" if token is None else f" ({token!r})"
        raise DataError(f"{where}: got token id {bad}{text}, expected ids in [0, {vocab_size}), the model's vocabulary")


def check_samples_fit(samples: Sequence[Any], name: str, cfg: TrainConfig, vocab_size: int | None) -> None:
    """Raises DataError unless samples built elsewhere fit the packs of a job and the vocabulary of a model."""
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
