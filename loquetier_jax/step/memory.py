"""How many KV pages fit beside everything else that an engine needs."""

import dataclasses
import logging
import math

import jax
import jax.numpy as jnp

from loquetier_jax.adapters.residency import STAGED_PAGES
from loquetier_jax.config import RANK_PAGE, EngineConfig
from loquetier_jax.errors import ConfigError
from loquetier_jax.models.spec import DecoderSpec

log = logging.getLogger(__name__)

JOBS = 8  # of rank 16, that the memory left for training holds by default
OPTIMIZER_BYTES = 12  # per parameter of an adapter: the master and two moments, f32
LOGITS = 3  # vocabulary-sized f32 arrays of the sampled rows that exist at once
GB = 1e9
GRAIN = 2**28


def sized(spec: DecoderSpec, cfg: EngineConfig) -> EngineConfig:
    """`cfg` with num_kv_pages set, if it is None and the device tells its memory.

    Call it when the base's parameters are on the device and nothing else is.

    Raises:
        ConfigError: not even one request of max_model_len tokens would fit.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    if cfg.num_kv_pages is not None or "bytes_limit" not in stats:
        return cfg
    free = cfg.gpu_memory_utilization * stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    # A few bytes more or less in use must not change the number: a second start is to find its executables.
    free -= free % (GRAIN if free > 8 * GRAIN else 1)
    pages = kv_pages_that_fit(spec, cfg, free)
    log.info("%d KV pages of %d tokens fit into %.1f GB", pages, cfg.kv_page_size, free / GB)
    return dataclasses.replace(cfg, num_kv_pages=pages)


def kv_pages_that_fit(spec: DecoderSpec, cfg: EngineConfig, free: float) -> int:
    """Number of KV pages, page 0 included, that fit into `free` bytes beside state, workspace and training.

    Raises:
        ConfigError: fewer than one request of max_model_len tokens needs.
    """
    train = train_bytes(spec, cfg) if cfg.train_memory_gb is None else cfg.train_memory_gb * GB
    left = free - state_bytes(spec, cfg) - staged_bytes(spec, cfg) - workspace_bytes(spec, cfg) - train
    pages = math.floor(max(left, 0) / kv_page_bytes(spec, cfg))
    least = 1 + cfg.max_pages_per_seq
    if pages < least:
        raise ConfigError(
            f"memory: got {free / GB:.1f} GB beside the base, enough for {pages} KV pages, expected room for {least} "
            f"(a request of max_model_len={cfg.max_model_len}): lower max_model_len, max_adapters or train_memory_gb, "
            "or raise gpu_memory_utilization"
        )
    return min(pages, 1 + cfg.max_num_seqs * cfg.max_pages_per_seq)


def kv_page_bytes(spec: DecoderSpec, cfg: EngineConfig) -> int:
    """Bytes of one KV page in all layers."""
    return 2 * spec.num_hidden_layers * cfg.kv_page_size * spec.kv_size * _itemsize(cfg)


def state_bytes(spec: DecoderSpec, cfg: EngineConfig) -> int:
    """Bytes of a DeviceState without the base and the KV cache: adapter pages, gradient pool, slots.

    Counted, not traced: a second start of an engine traces nothing.
    """
    slot = 4 + (4 + 1) * spec.vocab_size  # the last token; per token a count, and whether the prompt has it
    pages = _page_size(spec) * (cfg.adapter_pages * _itemsize(cfg) + (cfg.train_pages + 1) * 4)
    return pages + (cfg.max_num_seqs + 1) * slot


def staged_bytes(spec: DecoderSpec, cfg: EngineConfig) -> int:
    """Bytes of the adapters that are staged at most, each as it was transferred and as it will be written."""
    return 2 * max(STAGED_PAGES, cfg.max_lora_pages) * _page_size(spec) * _itemsize(cfg)


def workspace_bytes(spec: DecoderSpec, cfg: EngineConfig) -> int:
    """About the temporaries of the dearest step without train rows: activations of a layer, and logits."""
    serving = [b for b in cfg.buckets if not b.packs]
    rows = max(b.rows for b in serving)
    sampled = LOGITS * max(b.samples for b in serving)
    scored = 2 * cfg.logit_chunk if any(b.score_packs for b in serving) else 0
    return rows * _row_bytes(spec, cfg) + 4 * spec.vocab_size * max(sampled, scored)


def train_bytes(spec: DecoderSpec, cfg: EngineConfig) -> int:
    """About one pass of the largest training bucket, and JOBS jobs of rank 16 on all projections; 0 without buckets."""
    rows = max(b.train_rows for b in cfg.buckets)
    if not rows:
        return 0
    parameters = sum(RANK_PAGE * (n + m) for n, m in spec.target_shapes.values()) * spec.num_hidden_layers
    # The backward holds a gradient beside each activation of a layer, and two chunks of logits.
    passing = rows * (kept_row_bytes(spec, cfg) + 2 * _row_bytes(spec, cfg)) + 8 * spec.vocab_size * cfg.logit_chunk
    return passing + JOBS * OPTIMIZER_BYTES * parameters


def kept_row_bytes(spec: DecoderSpec, cfg: EngineConfig) -> int:
    """Bytes that a forward keeps of each train row, without what depends on its adapter's rank."""
    sizes = {name: sum(outs) for name, (_, outs) in spec.group_shapes.items()} | {"attention": spec.q_size}
    return spec.num_hidden_layers * _itemsize(cfg) * (spec.hidden_size + sum(sizes[name] for name in cfg.keep))


def _row_bytes(spec: DecoderSpec, cfg: EngineConfig) -> int:
    """Of one row in a layer: its input, residual, norm and output; qkv, attention; gate, up and their product."""
    wide = 4 * spec.hidden_size + 2 * spec.q_size + 2 * spec.kv_size + 3 * spec.intermediate_size
    return _itemsize(cfg) * wide


def _itemsize(cfg: EngineConfig) -> int:
    return jnp.dtype(cfg.dtype).itemsize


def _page_size(spec: DecoderSpec) -> int:
    """Numbers of one adapter page in all layers."""
    groups = spec.group_shapes.values()
    return spec.num_hidden_layers * RANK_PAGE * sum(len(outs) * features + sum(outs) for features, outs in groups)
