"""From what the scheduler chose to the numpy batch of one step: rows grouped by adapter once, on the host."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from loquetier_jax.batch.segments import MAX_BANNED, SampleRows, SegmentBatch, empty_batch, num_tiles, num_wide
from loquetier_jax.config import BLOCK, Bucket, EngineConfig
from loquetier_jax.jobs.data import Pack
from loquetier_jax.serve.params import SamplingParams
from pallas_kernels import build_plan

AdapterPages = tuple[int, ...]
Segment = tuple[int, int, AdapterPages]  # first row, rows, pages


@dataclass(frozen=True)
class TrainItem:
    """One pack of a job in this step.

    Attributes:
        pack: The rows.
        pages: The job's adapter pages.
        grad_pages: Its pages of the gradient pool, as many.
        dropout: Its LoRA dropout rate.
    """

    pack: Pack
    pages: AdapterPages
    grad_pages: AdapterPages
    dropout: float = 0.0


@dataclass(frozen=True)
class ScoreItem:
    """One pack that is only scored."""

    pack: Pack
    pages: AdapterPages


@dataclass(frozen=True)
class ServedItem:
    """What a request's rows need in any step.

    Attributes:
        slot: The request's slot.
        pages: Adapter pages of the version it runs on; () for the base.
        kv_pages: Its KV pages in order of position.
        params: Its sampling parameters.
        seed: Its sampling seed.
        index: How many tokens it has produced so far (dispatched, not necessarily read).
        stop_ids: Ids that end it, which min_tokens holds back.
    """

    slot: int
    pages: AdapterPages
    kv_pages: Sequence[int]
    params: SamplingParams
    seed: int
    index: int
    stop_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class ChunkItem:
    """A piece of a request's prompt: `tokens` at positions start, start + 1, ...; `final` samples the first token."""

    served: ServedItem
    tokens: np.ndarray
    start: int
    final: bool


@dataclass(frozen=True)
class DecodeItem:
    """The next token of a request: its last token, at `position`."""

    served: ServedItem
    position: int


@dataclass
class StepItems:
    """Everything one step carries, before it has a shape."""

    train: list[TrainItem] = field(default_factory=list)
    score: list[ScoreItem] = field(default_factory=list)
    prefill: list[ChunkItem] = field(default_factory=list)
    decode: list[DecodeItem] = field(default_factory=list)


def pack_step(items: StepItems, bucket: Bucket, cfg: EngineConfig) -> SegmentBatch:
    """Lays the items out in the rows of `bucket`. Sorts `items.prefill` and `items.decode` by adapter, in place.

    Returns:
        A numpy SegmentBatch. Sample row i belongs to items.decode[i], sample row bucket.decode + c to items.prefill[c].
    """
    items.prefill.sort(key=lambda item: item.served.pages)
    items.decode.sort(key=lambda item: item.served.pages)
    batch = empty_batch(bucket, cfg)
    segments: list[Segment] = []
    first = _fill_train(items.train, bucket, batch, segments)
    first = _fill_score(items.score, bucket, batch, segments, first)
    first = _fill_prefill(items.prefill, bucket, cfg, batch, segments, first)
    _fill_decode(items.decode, bucket, cfg, batch, segments, first)
    used = [s for s in segments if s[2]]
    plan = build_plan(used, bucket.rows, num_tiles(bucket), cfg.max_lora_pages, num_wide(bucket))
    return batch.replace(lora=plan)


def _fill_pack(rows: SegmentBatch, pack: Pack, at: int) -> None:
    end = at + len(pack.tokens)
    for name in ("tokens", "targets", "positions", "segments"):
        getattr(rows, name)[at:end] = getattr(pack, name)


def _fill_train(items: list[TrainItem], bucket: Bucket, batch: SegmentBatch, segments: list[Segment]) -> int:
    for g, item in enumerate(items):
        at, end = g * bucket.pack_tokens, g * bucket.pack_tokens + len(item.pack.tokens)
        _fill_pack(batch.train.rows, item.pack, at)
        batch.train.weights[at:end] = item.pack.weights
        batch.train.drop_keys[at:end] = item.pack.drop_keys
        batch.train.drop_rates[g] = item.dropout
        batch.train.pages[g, : len(item.pages)] = item.pages
        batch.train.grad_pages[g, : len(item.grad_pages)] = item.grad_pages
        segments.append((at, bucket.pack_tokens, item.pages))
    return bucket.train_rows


def _fill_score(
    items: list[ScoreItem], bucket: Bucket, batch: SegmentBatch, segments: list[Segment], first: int
) -> int:
    for g, item in enumerate(items):
        at = g * bucket.score_tokens
        _fill_pack(batch.score, item.pack, at)
        segments.append((first + at, bucket.score_tokens, item.pages))
    return first + bucket.score_rows


def _fill_prefill(
    items: list[ChunkItem],
    bucket: Bucket,
    cfg: EngineConfig,
    batch: SegmentBatch,
    segments: list[Segment],
    first: int,
) -> int:
    rows, at = batch.prefill, 0
    for c, item in enumerate(items):
        n = len(item.tokens)
        positions = np.arange(item.start, item.start + n, dtype=np.int32)
        table = np.asarray(item.served.kv_pages, np.int32)
        rows.tokens[at : at + n] = item.tokens
        rows.positions[at : at + n] = positions
        rows.kv_page[at : at + n] = table[positions // cfg.kv_page_size]
        rows.kv_offset[at : at + n] = positions % cfg.kv_page_size
        rows.plan.tables[c, : len(table)] = table
        blocks = -(-n // BLOCK)
        b, steps = at // BLOCK, BLOCK * np.arange(blocks, dtype=np.int32)
        rows.plan.block_seq[b : b + blocks] = c
        rows.plan.block_pos[b : b + blocks] = item.start + steps
        rows.plan.block_len[b : b + blocks] = np.minimum(n - steps, BLOCK)
        rows.last_row[c] = at + n - 1
        segments.append((first + at, n, item.served.pages))
        if item.final:
            _fill_sample(batch.sample, bucket.decode + c, item.served)
        at += blocks * BLOCK
    return first + bucket.prefill


def _fill_decode(
    items: list[DecodeItem],
    bucket: Bucket,
    cfg: EngineConfig,
    batch: SegmentBatch,
    segments: list[Segment],
    first: int,
) -> None:
    rows = batch.decode
    for i, item in enumerate(items):
        table = np.asarray(item.served.kv_pages, np.int32)
        rows.slots[i] = item.served.slot
        rows.positions[i] = item.position
        rows.kv_page[i] = table[item.position // cfg.kv_page_size]
        rows.kv_offset[i] = item.position % cfg.kv_page_size
        rows.plan.tables[i, : len(table)] = table
        rows.plan.block_pos[i] = item.position
        rows.plan.block_len[i] = 1
        _fill_sample(batch.sample, i, item.served)
    if rows is not None:
        rows.plan.block_seq[:] = np.arange(bucket.decode)
    at = first
    for pages, group in groupby(items, key=lambda item: item.served.pages):
        n = len(list(group))
        segments.append((at, n, pages))
        at += n


def _fill_sample(rows: SampleRows, i: int, served: ServedItem) -> None:
    p = served.params
    rows.slots[i], rows.index[i], rows.seed[i] = served.slot, served.index, served.seed
    rows.temperature[i], rows.top_k[i], rows.top_p[i], rows.min_p[i] = (
        p.temperature,
        p.top_k,
        p.top_p,
        p.min_p,
    )
    if p.level != "full":
        return
    rows.repetition_penalty[i] = p.repetition_penalty
    rows.presence_penalty[i] = p.presence_penalty
    rows.frequency_penalty[i] = p.frequency_penalty
    for j, (token, value) in enumerate((p.logit_bias or {}).items()):
        rows.bias_ids[i, j], rows.bias[i, j] = token, value
    if served.index < p.min_tokens:
        ids = served.stop_ids[:MAX_BANNED]
        rows.banned_ids[i, : len(ids)] = ids
