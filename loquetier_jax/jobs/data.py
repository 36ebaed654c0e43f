"""Training data: JSON lines or dicts to samples, all checked before anything trains; and their packs."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, UInt32

from loquetier_jax.config import is_int
from loquetier_jax.errors import DataError
from loquetier_jax.jobs.config import TrainConfig
from loquetier_jax.jobs.formats import parse_record
from loquetier_jax.jobs.tokenize import tokenize


@dataclass(frozen=True, eq=False)
class Sample:
    """One training example; `targets[i]` follows `tokens[i]`.

    Attributes:
        tokens: [n] input token ids.
        targets: [n] the token that follows each; 0 where it is not learnt.
        weights: [n] loss weights: 1 where the target is learnt, else 0.
        extras: By name, what a loss of one's own is to see: float32, [n] for a number per row, [] for one number.
    """

    tokens: Int32[np.ndarray, " n"]
    targets: Int32[np.ndarray, " n"]
    weights: Float32[np.ndarray, " n"]
    extras: Mapping[str, Float32[np.ndarray, "*n"]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)


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


@dataclass(frozen=True, eq=False)
class Dataset:
    """All samples of a job, tokenized.

    Attributes:
        name: Where they came from, for messages.
        samples: In the order of the data.
        num_truncated: Samples cut to the config's max_length.
        group_size: So many consecutive samples belong together, as a chosen and a rejected answer do: they are
            shuffled as one and share a pack, and batch sizes count groups.
        records: Hash of the records that the samples were made of; None where there were none.
    """

    name: str
    samples: tuple[Sample, ...]
    num_truncated: int = 0
    group_size: int = 1
    records: str | None = None

    def __post_init__(self) -> None:
        size = self.group_size
        if not is_int(size) or size < 1 or len(self.samples) % size:
            raise DataError(f"{self.name}: group_size: got {size!r}, expected a divisor of {len(self.samples)} samples")

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def num_groups(self) -> int:
        """What batch sizes count."""
        return len(self.samples) // self.group_size

    @cached_property
    def fingerprint(self) -> str:
        """Hash of every token, weight and extra: tells whether a checkpoint belongs to this data."""
        digest = hashlib.sha256(self.group_size.to_bytes(8, "little"))
        for sample in self.samples:
            digest.update(len(sample).to_bytes(8, "little"))
            extras = [sample.extras[name] for name in sorted(sample.extras)]
            digest.update(json.dumps(sorted(sample.extras)).encode())
            for array in (sample.tokens, sample.targets, sample.weights, *extras):
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    @property
    def num_targets(self) -> int:
        """Tokens learnt in one pass."""
        return sum(int(np.count_nonzero(s.weights)) for s in self.samples)


Data = str | Path | Sequence[Mapping[str, Any]] | Dataset


def load_dataset(
    data: Data, tokenizer: Any, cfg: TrainConfig, *, name: str = "data", now: datetime | None = None
) -> Dataset:
    """Reads, checks and tokenizes all of a job's data, so that a bad line is found before training starts.

    Args:
        data: A JSON-lines file, a list of records (see `formats.parse_record`), or a Dataset, taken as it is.
        tokenizer: A transformers tokenizer.
        cfg: max_length and completion_only_loss are used.
        name: What to call a list of records in messages.
        now: The time for chat templates that print the date; None is the present.

    Raises:
        DataError: names the file and line (or the list and index) and what is wrong with it.
    """
    if isinstance(data, Dataset):
        _check_lengths(data, cfg)
        return data
    if not isinstance(data, (str, Path, Sequence)) or isinstance(data, (bytes, bytearray)):
        raise DataError(f"{name}: got {type(data).__name__}, expected a JSON-lines file or a list of records")
    if tokenizer is None:
        raise DataError(f"{name}: got text, expected a Dataset of token ids: this engine has no tokenizer")
    if isinstance(data, (str, Path)):
        name, records = str(data), _read_jsonl(Path(data))
    else:
        records = ((f"{name}[{i}]", record) for i, record in enumerate(data))
    samples, truncated, digest = [], 0, hashlib.sha256()
    for where, record in records:
        parsed = parse_record(dict(record) if isinstance(record, Mapping) else record, where)
        digest.update(repr(parsed).encode("utf-8", "surrogatepass"))
        ids, learn = tokenize(parsed, tokenizer, completion_only=cfg.completion_only_loss, where=where, now=now)
        truncated += len(ids) > cfg.sample_tokens
        samples.append(_sample(ids, learn, cfg, where))
    if not samples:
        raise DataError(f"{name}: no records")
    return Dataset(name, tuple(samples), truncated, records=digest.hexdigest())


def make_sample(ids: Sequence[int], learn: Sequence[bool]) -> Sample:
    """A sample from token ids and which of them are learnt: inputs are ids[:-1], targets ids[1:]."""
    tokens = np.asarray(ids, np.int32)
    weights = np.asarray(learn, np.float32)[1:]
    return Sample(tokens[:-1].copy(), np.where(weights > 0, tokens[1:], 0).astype(np.int32), weights)


def _sample(ids: list[int], learn: list[bool], cfg: TrainConfig, where: str) -> Sample:
    cut = cfg.sample_tokens
    if any(learn[1:cut]):
        return make_sample(ids[:cut], learn[:cut])
    if any(learn[1:]):
        raise DataError(f"{where}: nothing to learn is left of {len(ids)} tokens cut to max_length = {cut}")
    raise DataError(f"{where}: nothing to learn: no assistant message, completion or second token")


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            where = f"{path}:{number}"
            try:
                line = raw.decode("utf-8")
                if not line.strip():
                    continue
                yield where, json.loads(line)
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8: {error}") from error
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not JSON: {error}") from error


def _check_lengths(data: Dataset, cfg: TrainConfig) -> None:
    """A Dataset built elsewhere must fit this job's packs."""
    if not data.samples:
        raise DataError(f"{data.name}: no records")
    for i, sample in enumerate(data.samples):
        if len(sample) > cfg.pack_rows or not np.any(sample.weights):
            raise DataError(
                f"{data.name}[{i}]: got {len(sample)} rows with {np.count_nonzero(sample.weights)} targets, "
                f"expected at most pack_tokens = {cfg.pack_rows} rows and at least one target"
            )
