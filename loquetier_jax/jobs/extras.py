"""What samples bring along for a loss of one's own: names, shapes, and their place in packs. No jax."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from loquetier_jax.errors import DataError
from loquetier_jax.jobs.data import Dataset, Pack, Sample
from loquetier_jax.jobs.packing import SAMPLE_ALIGN, rows_of

ExtraNames = tuple[tuple[str, bool], ...]  # (name, whether there is a number per row), sorted


def extra_names(sample: Sample) -> ExtraNames:
    """Names of a sample's extras, and whether each is a number per row (True) or one for the sample."""
    return tuple(sorted((name, np.ndim(value) == 1) for name, value in sample.extras.items()))


def check_samples(data: Dataset, pack_rows: int, *, own_loss: bool, like: Dataset | None = None) -> None:
    """Checks a data set for what its loss and its packs need.

    Args:
        data: All of it.
        pack_rows: Rows of a pack; a group has to fit one.
        own_loss: Whether there is a loss that can read extras.
        like: The data that `data` is held out from: the same loss reads the same extras of both.

    Raises:
        DataError: names the sample and what is wrong with it.
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
        expected = "none: cross-entropy reads none; pass the loss that does, TrainConfig(loss=...)"
        raise DataError(f"{data.name}: got extras {_spell(want)}, expected {expected}")
    for first in range(0, len(data), size):
        rows = rows_of(data.samples[first : first + size])
        if rows > pack_rows:
            raise DataError(
                f"{data.name}[{first}]: got a group of {size} samples that takes {rows} rows, expected at most "
                f"pack_tokens = {pack_rows}: they belong in one pack"
            )


def _check_values(sample: Sample, where: str) -> None:
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
