"""Engine configuration: frozen dataclasses that validate themselves on construction. Imports no jax."""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from loquetier_jax.bucket import BLOCK, PACK_ALIGN, Bucket
from loquetier_jax.require import is_int, is_number, require

__all__ = ["BLOCK", "PACK_ALIGN", "RANK_PAGE", "Bucket", "EngineConfig", "SLOConfig", "is_int", "is_number", "require"]

RANK_PAGE = 16  # ranks in one adapter page

DEFAULT_GAPS = 4.0  # longest planned gap between tokens, as a multiple of tpot_ms, when itl_p99_ms is not given

KEPT = ("qkv_proj", "attention", "o_proj", "gate_up_proj")  # train-row activations that the forward can keep


_INTEGERS = {  # field of EngineConfig: (smallest value, required divisor)
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


@dataclass(frozen=True, kw_only=True)
class SLOConfig:
    """Latency targets for requests; None means no target.

    Attributes:
        ttft_ms: Time to first token, milliseconds from arrival.
        tpot_ms: Mean time per output token after the first, milliseconds.
        itl_p99_ms: 99th percentile of the gaps between consecutive tokens of a request, milliseconds. Training is
            planned to keep every gap below it, or below DEFAULT_GAPS * tpot_ms when only a TPOT is given.
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    itl_p99_ms: float | None = None

    def __post_init__(self) -> None:
        for name, value in self.promised.items():
            require(is_number(value) and value > 0, f"SLOConfig.{name}", value, "a positive number or null")

    @property
    def promised(self) -> dict[str, float]:
        """The targets that are set, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    @property
    def longest_gap_ms(self) -> float:
        """Longest gap between two tokens that training may cause, milliseconds; inf with neither ITL nor TPOT set."""
        if self.itl_p99_ms is not None:
            return self.itl_p99_ms
        return math.inf if self.tpot_ms is None else DEFAULT_GAPS * self.tpot_ms


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything fixed for the life of an engine.

    Attributes:
        dtype: Compute dtype of base, adapters and KV cache.
        max_model_len: Maximum prompt + output tokens of one request.
        kv_page_size: Tokens per KV page, a multiple of BLOCK.
        num_kv_pages: Number of KV pages, including page 0 (the trash page); None takes as many as fit within
            `gpu_memory_utilization`, at most max_num_seqs full sequences, or exactly these where the device does not
            tell its memory.
        gpu_memory_utilization: Share of the memory that jax may use to be filled, in (0, 1]; see `step.memory`.
        train_memory_gb: Memory to leave for training if num_kv_pages is None; None: one pass of the largest training
            bucket and 8 jobs of rank 16; 0: serve only.
        enable_prefix_caching: Whether requests of one adapter version share the KV of a common beginning.
        max_num_seqs: Slots, i.e. the maximum number of running requests.
        max_adapters: Adapter pages on the device, i.e. resident adapters of rank <= 16 (rank r takes ceil(r/16)).
        max_host_adapters: Host copies of adapters, in page form and `dtype` (84 MB of rank 16 at 8B), from which they
            are loaded in one transfer; names of one folder share one. They are made ahead of the first request while
            there is room; the least recently used are dropped first and read from their folder again. None keeps the
            copy of every adapter ever loaded.
        max_lora_rank: Largest rank an adapter may have; a multiple of RANK_PAGE.
        train_pages: Rank-16 pages in the gradient pool, shared by all jobs.
        max_logprobs: Maximum alternatives returned per token, for `logprobs` and `prompt_logprobs`.
        max_logit_bias: Maximum entries of a request's logit_bias.
        logit_chunk: Rows of vocabulary-sized logits materialised at a time.
        keep: Train-row activations kept for the backward (a remat policy: the others are recomputed).
        slice_layers: Layers per forward or backward slice; 0 disables slicing. The whole stack is always one option.
        buckets: Shapes of the compiled forwards; serving buckets compile first.
        slo: Latency targets of the scheduler.
        smlm: Implementation of the LoRA op: "xla", "triton" or None (best for the device).
        attention: Implementation of paged attention, likewise.
        train_attention: Attention of train and score rows: "xla", "cudnn" or None.
        compilation_cache_dir: Where compiled functions are kept, and jax's compilation cache; "" keeps none and leaves
            jax's setting alone, None is ~/.cache/loquetier_jax/xla. See `loquetier_jax.executables`.
        seed: Seeds the generator of default seeds, for requests without one.
    """

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_model_len: int = 512
    kv_page_size: int = 16
    num_kv_pages: int | None = None
    gpu_memory_utilization: float = 0.92
    train_memory_gb: float | None = None
    enable_prefix_caching: bool = True
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
        caching = self.enable_prefix_caching
        require(isinstance(caching, bool), "enable_prefix_caching", caching, "true or false")
        share, train = self.gpu_memory_utilization, self.train_memory_gb
        require(is_number(share) and 0 < share <= 1, "gpu_memory_utilization", share, "a number in (0, 1]")
        ok = train is None or (is_number(train) and 0 <= train < math.inf)
        require(ok, "train_memory_gb", train, "a number >= 0 or null")
        require(isinstance(self.slo, SLOConfig), "slo", self.slo, "an SLOConfig")
        names = isinstance(self.keep, tuple) and set(self.keep) <= set(KEPT)
        require(names, "keep", self.keep, f"a subset of {KEPT}")
        self._check_buckets()

    def _check_buckets(self) -> None:
        ok = isinstance(self.buckets, tuple) and all(isinstance(b, Bucket) for b in self.buckets) and self.buckets
        require(ok, "buckets", self.buckets, "at least one Bucket (see configs/engine/)")
        for rows in ("prefill", "decode"):
            some = [b for b in self.buckets if getattr(b, rows)]
            require(some, "buckets", self.buckets, f"at least one bucket with {rows} rows")
        # A limit that no request can reach is none.
        most = self.max_model_len
        whole = tuple(replace(b, context=0) if b.context >= most else b for b in self.buckets)
        object.__setattr__(self, "buckets", whole)
        serving = [b for b in whole if not b.packs and not b.context]
        ok = all(not b.context for b in whole) or (any(b.prefill for b in serving) and any(b.decode for b in serving))
        expected = "prefill and decode rows in buckets without a limit of context and without training packs"
        require(ok, "buckets", [b.name for b in whole], expected)

    @property
    def sample_sizes(self) -> tuple[int, ...]:
        """Row counts of the compiled samplers: the distinct `samples` of all buckets."""
        return tuple(sorted({b.samples for b in self.buckets} - {0}))

    @property
    def max_pages_per_seq(self) -> int:
        """KV pages of the longest request."""
        return -(-self.max_model_len // self.kv_page_size)

    def table_columns(self, bucket: Bucket) -> int:
        """Columns of the page tables in a bucket."""
        context = min(bucket.context or self.max_model_len, self.max_model_len)
        return -(-context // self.kv_page_size)

    @property
    def kv_pages(self) -> int:
        """Number of KV pages, including trash page 0."""
        return self.num_kv_pages or 1 + self.max_num_seqs * self.max_pages_per_seq

    @property
    def adapter_pages(self) -> int:
        """Pages in the device stacks: page 0, all zeros, and `max_adapters` more."""
        return 1 + self.max_adapters

    def longest_pack(self, *, scored: bool = False) -> int | None:
        """Largest pack_tokens of any train bucket, capped by the score buckets if `scored`; None without buckets."""
        longest = max((b.pack_tokens for b in self.buckets if b.packs), default=None)
        held = max((b.score_tokens for b in self.buckets if b.score_packs), default=None)
        return min((n for n in (longest, held if scored else None) if n is not None), default=None)

    @property
    def max_lora_pages(self) -> int:
        """MP: maximum pages of one adapter."""
        return self.max_lora_rank // RANK_PAGE
