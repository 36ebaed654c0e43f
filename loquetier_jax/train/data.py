"""Training data: converts records of any format to samples, and checks them all before training starts."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from loquetier_jax.config import is_int
from loquetier_jax.errors import DataError, short
from loquetier_jax.train.config import TrainConfig
from loquetier_jax.train.data_checks import check_samples_fit, check_token_ids
from loquetier_jax.train.formats import parse_record
from loquetier_jax.train.records import is_empty, records_of, tokenized
from loquetier_jax.train.tokenize import tokenize

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Sample:
    """One training example; `targets[i]` follows `tokens[i]`.

    Attributes:
        tokens: [n] input token ids.
        targets: [n] the next token of each row; 0 where it has no loss.
        weights: [n] loss weights: 1 where the target has loss, else 0.
        extras: Inputs of a custom loss, by name: float32, [n] for a number per row, [] for one per sample.
    """

    tokens: Int32[np.ndarray, " n"]
    targets: Int32[np.ndarray, " n"]
    weights: Float32[np.ndarray, " n"]
    extras: Mapping[str, Float32[np.ndarray, "*n"]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class Dataset:
    """All tokenized samples of a job.

    Attributes:
        name: Where they came from, for error messages.
        samples: In the order of the data.
        num_truncated: Samples cut to max_length.
        num_tokens_cut: Tokens removed from them.
        num_dropped: Records omitted because they are too long (truncation="drop").
        num_empty: Records omitted because their answer is empty.
        group_size: Number of consecutive samples that belong together, like a chosen and a rejected answer: a group is
            shuffled as a unit and stays in one pack, and batch sizes count groups.
        records: Hash of the records from which the samples were made; None if there were none.
    """

    name: str
    samples: tuple[Sample, ...]
    num_truncated: int = 0
    num_tokens_cut: int = 0
    num_dropped: int = 0
    num_empty: int = 0
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
        """Number of groups of samples, the unit of batch sizes."""
        return len(self.samples) // self.group_size

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all tokens, weights and extras, which identifies the data of a checkpoint."""
        digest = hashlib.sha256(self.group_size.to_bytes(8, "little"))
        for sample in self.samples:
            digest.update(len(sample).to_bytes(8, "little"))
            extras = [sample.extras[name] for name in sorted(sample.extras)]
            digest.update(json.dumps(sorted(sample.extras)).encode())
            for array in (sample.tokens, sample.targets, sample.weights, *extras):
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    @property
    def left_out(self) -> dict[str, int]:
        """The non-zero counts of truncated and omitted records, for a line of metrics."""
        names = ("num_truncated", "num_tokens_cut", "num_dropped", "num_empty")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    @property
    def num_targets(self) -> int:
        """Tokens with loss in one epoch."""
        return sum(int(np.count_nonzero(s.weights)) for s in self.samples)


Data = str | Path | Iterable[Mapping[str, Any]] | Dataset


def load_dataset(
    data: Data,
    tokenizer: Any,
    cfg: TrainConfig,
    *,
    name: str = "data",
    vocab_size: int | None = None,
    now: datetime | None = None,
) -> Dataset:
    """Reads, checks and tokenizes all of a job's data, so that bad lines are found before training starts.

    Truncated and omitted records are counted in the Dataset and logged as warnings.

    Args:
        data: A file of JSON lines or of one JSON array, or any iterable of records: a list, a generator, a
            `datasets.Dataset`. For the record formats see `formats.parse_record` and, for token ids,
            `records.tokenized`. A Dataset is only checked.
        tokenizer: A transformers tokenizer; may be None if all records are token ids.
        cfg: Provides max_length, pack_tokens, truncation and completion_only_loss.
        name: Name of data other than files in error messages.
        vocab_size: V; token ids must be below it.
        now: Date and time for chat templates that print them; None means now.

    Raises:
        DataError: names the file and line (or the list and index) and the problem.
    """
    if isinstance(data, Dataset):
        check_samples_fit(data.samples, data.name, cfg, vocab_size)
        return data
    intake = _Intake(tokenizer, cfg, vocab_size, now)
    name = str(data) if isinstance(data, (str, os.PathLike)) else name
    for where, record in records_of(data, name):
        intake.add(record, where)
    return intake.dataset(name)


def make_sample(ids: Sequence[int], learn: Sequence[bool], where: str = "sample") -> Sample:
    """A sample from token ids and their loss mask: inputs are ids[:-1], targets ids[1:].

    Raises:
        DataError: starting with `where`: ids that are not integers in [0, 2**31), or a mask of another length.
    """
    given = np.asarray(ids)
    whole = given.dtype.kind in "iu" or not given.size
    if not whole or given.ndim != 1 or (given.size and not 0 <= given.min() <= given.max() < 2**31):
        raise DataError(f"{where}: token ids: got {short(ids, 200)}, expected a list of integers in [0, 2**31)")
    tokens = given.astype(np.int32)
    flags = np.asarray(learn, object)
    if flags.shape != tokens.shape or not all(flag in (0, 1) for flag in flags):
        raise DataError(f"{where}: learn: got {learn!r:.200}, expected {len(tokens)} booleans, one for each token id")
    weights = flags.astype(np.float32)[1:]
    return Sample(tokens[:-1].copy(), np.where(weights > 0, tokens[1:], 0).astype(np.int32), weights)


@dataclass
class _Intake:
    """Collects records into a Dataset."""

    tokenizer: Any
    cfg: TrainConfig
    vocab_size: int | None
    now: datetime | None
    samples: list[Sample] = field(default_factory=list)
    truncated: int = 0
    tokens_cut: int = 0
    dropped: int = 0
    empty: list[str] = field(default_factory=list)
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, record: Any, where: str) -> None:
        """Tokenizes and checks a record, and keeps its sample unless it is to be omitted."""
        if isinstance(record, dict) and is_empty(record, where):
            self.empty.append(where)
            return
        ids, learn = self._tokens(record, where)
        if not any(learn[1:]):
            expected = "one behind the first that is an answer and that no weight, train, label or mask takes out"
            raise DataError(f"{where}: nothing to learn: got {len(ids)} tokens, expected {expected}")
        sample, most = make_sample(ids, learn, where), self.cfg.sample_tokens
        check_token_ids(sample, self.vocab_size, where, self.tokenizer)
        if len(ids) > most:
            if self.cfg.truncation == "error":
                raise DataError(f"{where}: got {len(ids)} tokens, expected at most max_length = {most}")
            if self.cfg.truncation == "drop":
                self.dropped += 1
                return
            begin = ids[0] == getattr(self.tokenizer, "bos_token_id", None)
            sample = truncate(sample, most - 1, self.cfg.truncation, keep_begin=begin)
            self.truncated, self.tokens_cut = self.truncated + 1, self.tokens_cut + len(ids) - most
            if not np.any(sample.weights):
                raise DataError(
                    f"{where}: nothing to learn is left of {len(ids)} tokens cut to max_length = {most} "
                    f"by truncation = {self.cfg.truncation!r}; 'drop' leaves such samples out"
                )
        self.samples.append(sample)

    def _tokens(self, record: Any, where: str) -> tuple[list[int], list[bool]]:
        completion_only = self.cfg.completion_only_loss
        if isinstance(record, dict) and "input_ids" in record:
            found = tokenized(record, where, completion_only=completion_only)
            self.digest.update(repr(found).encode())
            return found
        parsed = parse_record(record, where)
        self.digest.update(repr(parsed).encode("utf-8", "surrogatepass"))
        if self.tokenizer is None:
            raise DataError(f"{where}: got text, expected input_ids: this engine has no tokenizer")
        return tokenize(parsed, self.tokenizer, completion_only=completion_only, where=where, now=self.now)

    def dataset(self, name: str) -> Dataset:
        """The samples kept; logs what was not."""
        kept, dropped, empty, most = len(self.samples), self.dropped, len(self.empty), self.cfg.sample_tokens
        total = kept + dropped + empty
        if not total:
            raise DataError(f"{name}: no records")
        if not kept:
            raise DataError(f"{name}: none of {total} records is left: {dropped} too long, {empty} without an answer")
        if self.truncated:
            side, lost = self.cfg.truncation, ""
            if side == "right":
                lost = "; their ends, and with them the end tokens, are not learnt"
            told = f"{self.truncated} of {total} samples are longer than {most} tokens and truncated on the {side}"
            log.warning("%s: %s, by %d tokens in all%s (max_length, truncation)", name, told, self.tokens_cut, lost)
        if dropped:
            log.warning("%s: %d of %d samples are longer than %d tokens and left out", name, dropped, total, most)
        if empty:
            told = f"{empty} of {total} records have an empty answer and are left out"
            log.warning("%s: %s, the first is %s", name, told, self.empty[0])
        rest = {"num_truncated": self.truncated, "num_tokens_cut": self.tokens_cut, "records": self.digest.hexdigest()}
        return Dataset(name, tuple(self.samples), **rest, num_dropped=dropped, num_empty=empty)


def truncate(sample: Sample, rows: int, side: str, *, keep_begin: bool = False) -> Sample:
    """The first (side "right") or last ("left") rows of a sample; `keep_begin` puts its first token before the last."""
    at = slice(rows) if side == "right" else slice(len(sample) - rows, None)
    cut = Sample(sample.tokens[at].copy(), sample.targets[at].copy(), sample.weights[at].copy())
    if side == "left" and keep_begin:
        cut.tokens[0], cut.targets[0], cut.weights[0] = sample.tokens[0], 0, 0
    return cut
