"""Engine configuration: frozen dataclasses, each checked as it is made. Imports no jax."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from loquetier_jax.errors import ConfigError, short

RANK_PAGE = 16  # ranks in one adapter page
BLOCK = 16  # rows of one prefill block and of one LoRA tile
PACK_ALIGN = 64  # pack lengths are multiples of this: keeps gradient bits free of position on the XLA CPU path

DEFAULT_GAPS = 4.0  # times tpot_ms: the longest planned gap where itl_p99_ms is not given

KEPT = ("qkv_proj", "attention", "o_proj", "gate_up_proj")  # names of train-row activations that may be kept


_INTEGERS = {  # field of EngineConfig: (smallest value, what it is a multiple of)
    "max_model_len": (1, 1),
    "kv_page_size": (BLOCK, BLOCK),
    "num_kv_pages": (2, 1),
    "max_num_seqs": (1, 1),
    "max_adapters": (1, 1),
    "max_host_adapters": (0, 1),
    "max_lora_rank": (RANK_PAGE, RANK_PAGE),
    "train_pages": (1, 1),
    "max_logprobs": (0, 1),
    "max_logit_bias": (1, 1),
    "logit_chunk": (1, 1),
    "slice_layers": (0, 1),
    "seed": (0, 1),
}
_NULLABLE = ("num_kv_pages", "max_host_adapters")
_CHOICES = {
    "dtype": ("float32", "bfloat16", "float16"),
    "smlm": ("xla", "triton", None),
    "attention": ("xla", "triton", None),
    "train_attention": ("xla", "cudnn", None),
}


def is_int(value: Any) -> bool:
    """Whether `value` is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether `value` is an integer or a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def require(ok: Any, name: str, got: Any, expected: str) -> None:
    """Raises ConfigError naming the argument, what came and what was expected."""
    if not ok:
        raise ConfigError(f"{name}: got {short(got, 500)}, expected {expected}")


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """The static shape of one compiled forward.

    Rows in flat order: train `packs * pack_tokens`, score `score_packs * score_tokens`, `prefill`, `decode`.

    Attributes:
        packs: Training packs in the step.
        pack_tokens: Rows of one training pack, a multiple of PACK_ALIGN.
        score_packs: Packs that are only scored (evaluation, `log_probs`).
        score_tokens: Rows of one score pack, a multiple of PACK_ALIGN.
        prefill: Prompt rows, a multiple of BLOCK; every chunk starts on a block.
        chunks: Most prompt chunks (sequences) sharing the prefill rows.
        decode: Most sequences decoding one token each.
    """

    packs: int = 0
    pack_tokens: int = 0
    score_packs: int = 0
    score_tokens: int = 0
    prefill: int = 0
    chunks: int = 0
    decode: int = 0

    removed: ClassVar[dict[str, str]] = {"sampling": "every bucket serves every way of sampling: leave the key out"}

    def __post_init__(self) -> None:
        for name in ("packs", "pack_tokens", "score_packs", "score_tokens", "prefill", "chunks", "decode"):
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

    @property
    def train_rows(self) -> int:
        return self.packs * self.pack_tokens

    @property
    def score_rows(self) -> int:
        return self.score_packs * self.score_tokens

    @property
    def rows(self) -> int:
        """All rows of the step: T."""
        return self.train_rows + self.score_rows + self.prefill + self.decode

    @property
    def samples(self) -> int:
        """Rows that a token is sampled for: one per decode row and one per chunk."""
        return self.decode + self.chunks

    @property
    def name(self) -> str:
        parts = [
            f"train{self.packs}x{self.pack_tokens}" if self.packs else "",
            f"score{self.score_packs}x{self.score_tokens}" if self.score_packs else "",
            f"prefill{self.prefill}" if self.prefill else "",
            f"decode{self.decode}" if self.decode else "",
        ]
        return "-".join(p for p in parts if p)

    def covers(self, need: "Bucket") -> bool:
        """Whether a step that needs `need` fits into this bucket.

        Train packs must have the very same length (a job's numbers are those of its shape), score packs may be padded.
        """
        same_packs = not need.packs or need.pack_tokens == self.pack_tokens
        counts = ("packs", "score_packs", "score_tokens", "prefill", "chunks", "decode")
        return same_packs and all(getattr(self, c) >= getattr(need, c) for c in counts)


@dataclass(frozen=True, kw_only=True)
class SLOConfig:
    """The latency promise to requests; None promises nothing.

    Attributes:
        ttft_ms: Time to first token, milliseconds from arrival.
        tpot_ms: Mean time per output token after the first, milliseconds.
        itl_p99_ms: 99 of 100 gaps between two tokens of a request are no longer, milliseconds. Training is planned so
            that none is; where only a TPOT is promised, that none is longer than DEFAULT_GAPS times it.
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    itl_p99_ms: float | None = None

    def __post_init__(self) -> None:
        for name, value in self.promised.items():
            require(is_number(value) and value > 0, f"SLOConfig.{name}", value, "a positive number or null")

    @property
    def promised(self) -> dict[str, float]:
        """The thresholds there are, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    @property
    def longest_gap_ms(self) -> float:
        """The longest gap between two tokens that is planned; inf where neither gaps nor their mean are promised."""
        if self.itl_p99_ms is not None:
            return self.itl_p99_ms
        return math.inf if self.tpot_ms is None else DEFAULT_GAPS * self.tpot_ms


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything fixed for the life of an engine.

    Attributes:
        dtype: Compute dtype of base, adapters and KV cache.
        max_model_len: Longest prompt + output of one request, tokens.
        kv_page_size: Tokens of one KV page, a multiple of BLOCK.
        num_kv_pages: KV pages in all, page 0 (the trash page) included; None: room for max_num_seqs full sequences.
        max_num_seqs: Slots: requests running at once.
        max_adapters: Device room in rank-16 pages: adapters of rank <= 16 resident at once (rank r takes ceil(r/16)).
        max_host_adapters: Host copies kept of adapters whose PEFT folder can be read again, least recently used
            dropped first; None keeps all.
        max_lora_rank: Largest rank an adapter may have; a multiple of RANK_PAGE.
        train_pages: Rank-16 pages of the gradient pool: all adapters in training together.
        max_logprobs: Most alternatives returned per token, `logprobs` and `prompt_logprobs`.
        max_logit_bias: Most entries of a request's logit_bias.
        logit_chunk: Rows whose vocabulary-sized logits exist at once.
        keep: Names of train-row activations kept for the backward (a remat policy: the others are recomputed).
        slice_layers: Layers of one backward (and forward) slice; the whole stack is always available as one slice.
        buckets: The compiled forwards; serving ones compile first.
        slo: The latency promise the scheduler keeps.
        smlm: Implementation of the LoRA op: "xla", "triton" or None (best for the device).
        attention: Implementation of paged attention, likewise.
        train_attention: "xla", "cudnn" or None, for train and score rows.
        compilation_cache_dir: Persistent XLA cache; "" switches it off, None is ~/.cache/loquetier_jax/xla.
        seed: Seed of the seeds of requests that bring none.
    """

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_model_len: int = 512
    kv_page_size: int = 16
    num_kv_pages: int | None = None
    max_num_seqs: int = 64
    max_adapters: int = 32
    max_host_adapters: int | None = None
    max_lora_rank: int = 64
    train_pages: int = 8
    max_logprobs: int = 16
    max_logit_bias: int = 64
    logit_chunk: int = 1024
    keep: tuple[str, ...] = KEPT
    slice_layers: int = 0
    buckets: tuple[Bucket, ...] = ()
    slo: SLOConfig = field(default_factory=SLOConfig)
    smlm: Literal["xla", "triton"] | None = None
    attention: Literal["xla", "triton"] | None = None
    train_attention: Literal["xla", "cudnn"] | None = None
    compilation_cache_dir: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (least, step) in _INTEGERS.items():
            value = getattr(self, name)
            if value is not None or name not in _NULLABLE:
                kind = "an integer" if step == 1 else f"a multiple of {step}"
                ok = is_int(value) and value >= least and value % step == 0
                require(ok, name, value, f"{kind} >= {least}{' or null' if name in _NULLABLE else ''}")
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            require(value in known, name, value, f"one of {known}")
        folder = self.compilation_cache_dir
        require(folder is None or isinstance(folder, str), "compilation_cache_dir", folder, "a path or null")
        require(isinstance(self.slo, SLOConfig), "slo", self.slo, "an SLOConfig")
        names = isinstance(self.keep, tuple) and set(self.keep) <= set(KEPT)
        require(names, "keep", self.keep, f"a subset of {KEPT}")
        self._check_buckets()

    def _check_buckets(self) -> None:
        ok = isinstance(self.buckets, tuple) and all(isinstance(b, Bucket) for b in self.buckets) and self.buckets
        require(ok, "buckets", self.buckets, "at least one Bucket (see configs/engine/)")
        for rows in ("prefill", "decode"):
            some = any(getattr(b, rows) for b in self.buckets)
            require(some, "buckets", self.buckets, f"at least one bucket with {rows} rows")

    @property
    def sample_sizes(self) -> tuple[int, ...]:
        """Rows of the samplers: one for every number of rows that a bucket draws tokens from."""
        return tuple(sorted({b.samples for b in self.buckets} - {0}))

    @property
    def max_pages_per_seq(self) -> int:
        """Columns of a page table."""
        return -(-self.max_model_len // self.kv_page_size)

    @property
    def kv_pages(self) -> int:
        """KV pages in all, the trash page 0 included."""
        return self.num_kv_pages or 1 + self.max_num_seqs * self.max_pages_per_seq

    @property
    def adapter_pages(self) -> int:
        """Rows of the device page stacks; page 0 is all zeros, the rest is `max_adapters`."""
        return 1 + self.max_adapters

    def longest_pack(self, *, scored: bool = False) -> int | None:
        """Most pack_tokens of a train bucket, None without any; of what score buckets hold if it is `scored`, too."""
        longest = max((b.pack_tokens for b in self.buckets if b.packs), default=None)
        held = max((b.score_tokens for b in self.buckets if b.score_packs), default=None)
        return min((n for n in (longest, held if scored else None) if n is not None), default=None)

    @property
    def max_lora_pages(self) -> int:
        """Most pages one adapter takes: MP."""
        return self.max_lora_rank // RANK_PAGE
