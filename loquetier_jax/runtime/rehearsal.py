"""Steps of rows like real ones, so that warm-up measures what serving will take: contexts, adapters, full packs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loquetier_jax.batch.pack import AdapterPages, ScoreItem, StepItems, pack_step
from loquetier_jax.batch.packs import Pack
from loquetier_jax.batch.rows import SegmentBatch
from loquetier_jax.config import BLOCK, Bucket, EngineConfig
from loquetier_jax.sampling_params import SamplingParams
from loquetier_jax.train.data import make_sample
from loquetier_jax.train.packing import build_pack

TYPICAL_CONTEXT = 512  # tokens
ADAPTERS = 4  # in a step, in equal shares


@dataclass
class Understudy:
    """A request that exists only in a rehearsal (see `batch.pack.ServedRequest`).

    `adapter_pages` and `kv_pages` may belong to others: they are read, and what is read does not matter.
    """

    slot: int
    adapter_pages: AdapterPages
    kv_pages: tuple[int, ...]
    prompt_ids: Sequence[int]
    num_prefilled: int
    num_dispatched: int
    params: SamplingParams = SamplingParams(temperature=0)  # noqa: RUF009  (frozen)
    seed: int = 0
    stop_ids: tuple[int, ...] = ()


def decode_rows(cfg: EngineConfig, rows: int, context: int) -> list[Understudy]:
    """`rows` decode rows that each attend to `context` tokens."""
    prompt = np.zeros(context - 1, np.int32)
    return [_understudy(cfg, i, prompt, context - 1, 1) for i in range(rows)]


def prompt_chunk(cfg: EngineConfig, index: int, start: int, tokens: int) -> tuple[Understudy, int]:
    """A chunk of `tokens` rows behind `start` tokens, the last of its prompt."""
    return _understudy(cfg, index, np.zeros(start + tokens, np.int32), start, 0), tokens


def _understudy(cfg: EngineConfig, index: int, prompt: np.ndarray, prefilled: int, dispatched: int) -> Understudy:
    per, total = -(-(len(prompt) + 1) // cfg.kv_page_size), cfg.kv_pages - 1
    kv_pages = tuple(1 + (index * per + j) % total for j in range(per))
    adapters = min(ADAPTERS, cfg.adapter_pages - 1)
    pages = (1 + index % adapters,) if adapters else ()
    return Understudy(cfg.max_num_seqs, pages, kv_pages, prompt, prefilled, dispatched)


def full_step(bucket: Bucket, cfg: EngineConfig) -> StepItems[Understudy]:
    """Rows that fill a bucket without train packs."""
    most = min(bucket.context or cfg.max_model_len, cfg.max_model_len)
    context = min(TYPICAL_CONTEXT, cfg.max_model_len // 2, most)
    items = StepItems(decode=decode_rows(cfg, bucket.decode, context))
    if bucket.chunks:
        tokens = max(1, min(bucket.prefill // bucket.chunks, most - 1) // BLOCK * BLOCK)
        items.prefill = [prompt_chunk(cfg, bucket.decode + c, 0, tokens) for c in range(bucket.chunks)]
    if bucket.score_packs:
        pages = (1,) if cfg.adapter_pages > 1 else ()
        items.score = [ScoreItem(_full_pack(bucket.score_tokens), pages)] * bucket.score_packs
    return items


def harmless(items: StepItems[Understudy], bucket: Bucket, cfg: EngineConfig) -> SegmentBatch:
    """The step laid out, with every write to the KV cache redirected to the trash page."""
    batch = pack_step(items, bucket, cfg).batch
    parts = {name: getattr(batch, name) for name in ("prefill", "decode")}
    return batch.replace(**{n: part.replace(kv_page=np.zeros_like(part.kv_page)) for n, part in parts.items() if part})


def _full_pack(tokens: int) -> Pack:
    return build_pack([make_sample([0] * (tokens + 1), [True] * (tokens + 1))], [0], tokens)
