"""Bucket: the static shape of one compiled forward. Imports no jax."""

import warnings
from dataclasses import InitVar, dataclass
from typing import ClassVar

from loquetier_jax.require import is_int, require

BLOCK = 16  # rows of one prefill block and of one LoRA tile
PACK_ALIGN = 64  # pack lengths are multiples of this, so that gradient bits on CPU do not depend on position


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """The static shape of one compiled forward.

    Rows in flat order: train `packs * pack_tokens`, score `score_packs * score_tokens`, `prefill`, `decode`.

    Attributes:
        packs: Training packs in the step.
        pack_tokens: Rows of one training pack, a multiple of PACK_ALIGN.
        score_packs: Packs that are scored but not trained on (evaluation, `log_probs`).
        score_tokens: Rows of one score pack, a multiple of PACK_ALIGN.
        prefill: Prompt rows, a multiple of BLOCK; every chunk starts on a block.
        chunks: Maximum number of prompt chunks (sequences) sharing the prefill rows.
        decode: Maximum number of sequences decoding one token each.
        context: Maximum tokens that a prefill or decode row attends to, itself included; 0 sets no limit. A short limit
            makes page tables smaller, and attention splits into fewer parts.
        sampling: Deprecated, without effect: every bucket supports all sampling parameters.
    """

    packs: int = 0
    pack_tokens: int = 0
    score_packs: int = 0
    score_tokens: int = 0
    prefill: int = 0
    chunks: int = 0
    decode: int = 0
    context: int = 0
    sampling: InitVar[str | None] = None

    removed: ClassVar[dict[str, str]] = {"sampling": "every bucket supports all sampling parameters"}

    def __post_init__(self, sampling: str | None) -> None:
        if sampling is not None:
            known = ("greedy", "plain", "full")
            require(sampling in known, "Bucket.sampling", sampling, f"none (deprecated; one of {known} has no effect)")
            message = f"Bucket.sampling has no effect any more: {self.removed['sampling']}"
            warnings.warn(message, DeprecationWarning, stacklevel=3)
        for name in ("packs", "pack_tokens", "score_packs", "score_tokens", "prefill", "chunks", "decode", "context"):
            value = getattr(self, name)
            require(is_int(value) and value >= 0, f"Bucket.{name}", value, "an integer >= 0")
        for name in ("pack_tokens", "score_tokens"):
            value = getattr(self, name)
            require(value % PACK_ALIGN == 0, f"Bucket.{name}", value, f"a multiple of {PACK_ALIGN}")
        require(
            (self.packs > 0) == (self.pack_tokens > 0),
            "Bucket.packs",
            self.packs,
            "0 exactly when pack_tokens is 0",
        )
        require(
            (self.score_packs > 0) == (self.score_tokens > 0),
            "Bucket.score_packs",
            self.score_packs,
            "0 exactly when score_tokens is 0",
        )
        require(self.prefill % BLOCK == 0, "Bucket.prefill", self.prefill, f"a multiple of {BLOCK}")
        require(
            (self.chunks > 0) == (self.prefill > 0) and self.chunks * BLOCK <= self.prefill,
            "Bucket.chunks",
            self.chunks,
            f"between 1 and prefill / {BLOCK} when prefill > 0, else 0",
        )
        require(self.rows > 0, "Bucket", self, "at least one row")
        inference = self.prefill or self.decode
        require(not self.context or inference, "Bucket.context", self.context, "0 without prefill and decode rows")

    @property
    def train_rows(self) -> int:
        return self.packs * self.pack_tokens

    @property
    def score_rows(self) -> int:
        return self.score_packs * self.score_tokens

    @property
    def rows(self) -> int:
        """T: all rows of the step."""
        return self.train_rows + self.score_rows + self.prefill + self.decode

    @property
    def samples(self) -> int:
        """Sampled tokens per step: one per decode row and one per chunk."""
        return self.decode + self.chunks

    @property
    def name(self) -> str:
        parts = [
            f"train{self.packs}x{self.pack_tokens}" if self.packs else "",
            f"score{self.score_packs}x{self.score_tokens}" if self.score_packs else "",
            f"prefill{self.prefill}" if self.prefill else "",
            f"decode{self.decode}" if self.decode else "",
            f"context{self.context}" if self.context else "",
        ]
        return "-".join(p for p in parts if p)

    def fits(self, context: int) -> bool:
        """Whether rows that attend to `context` tokens fit."""
        return not self.context or context <= self.context

    def covers(self, need: "Bucket") -> bool:
        """Whether a step that needs `need` fits into this bucket.

        Train packs must match in length, because a job's numerics depend on the pack shape; score packs may be padded.
        """
        same_packs = not need.packs or need.pack_tokens == self.pack_tokens
        reads = not (need.prefill or need.decode) or not self.context or 0 < need.context <= self.context
        counts = ("packs", "score_packs", "score_tokens", "prefill", "chunks", "decode")
        return same_packs and reads and all(getattr(self, c) >= getattr(need, c) for c in counts)
