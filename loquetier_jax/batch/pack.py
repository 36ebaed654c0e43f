"""Lays out the work chosen by the scheduler as the numpy batch of one step, with rows grouped by adapter."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from loquetier_jax.batch.packs import Pack
from loquetier_jax.batch.rows import (
    MAX_BANNED,
    SampleRows,
    SegmentBatch,
    empty_batch,
    empty_sample,
    num_tiles,
    num_wide,
)
from loquetier_jax.config import BLOCK, Bucket, EngineConfig
from loquetier_jax.sampling_params import SamplingParams
from pallas_kernels import build_plan

AdapterPages = tuple[int, ...]
Segment = tuple[int, int, AdapterPages]  # first row, number of rows, pages


@dataclass(frozen=True)
class TrainItem:
    """One pack of a job in this step.

    Attributes:
        pack: The rows.
        pages: The job's adapter pages.
        grad_pages: Its pages in the gradient pool, one per adapter page.
        dropout: Its LoRA dropout rate.
    """

    pack: Pack
    pages: AdapterPages
    grad_pages: AdapterPages
    dropout: float = 0.0


@dataclass(frozen=True)
class ScoreItem:
    """One pack to score without training on it."""

    pack: Pack
    pages: AdapterPages


class ServedRequest(Protocol):
    """The part of a request that its rows depend on; implemented by `serve.request.Request`, see its attributes."""

    slot: int | None
    adapter_pages: AdapterPages
    kv_pages: tuple[int, ...]
    params: SamplingParams
    seed: int
    prompt_ids: Sequence[int]
    num_prefilled: int
    num_dispatched: int

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end it, banned until min_tokens is reached."""


R = TypeVar("R", bound=ServedRequest)
Chunk = tuple[R, int]
"""(request, number of prompt tokens to prefill next); the last token of the prompt samples the first output."""


@dataclass
class StepItems(Generic[R]):
    """Everything in one step, before it is laid out in a bucket.

    Attributes:
        train, score: Packs.
        prefill: Prompt chunks.
        decode: Requests that get their next token.
    """

    train: list[TrainItem] = field(default_factory=list)
    score: list[ScoreItem] = field(default_factory=list)
    prefill: list[Chunk[R]] = field(default_factory=list)
    decode: list[R] = field(default_factory=list)


class PackedStep(NamedTuple, Generic[R]):
    """A step laid out in the shapes of its bucket, in numpy.

    Attributes:
        batch: Input of the forward.
        sample: Input of the sampler; None if no token is sampled.
        owners: (sample row, request) for every sampled token, in order.
    """

    batch: SegmentBatch
    sample: SampleRows | None
    owners: list[tuple[int, R]]


def pack_step(items: StepItems[R], bucket: Bucket, cfg: EngineConfig) -> PackedStep[R]:
    """Lays the items out in the rows of `bucket`, requests grouped by adapter."""
    prefill = sorted(items.prefill, key=lambda chunk: chunk[0].adapter_pages)
    decode = sorted(items.decode, key=lambda request: request.adapter_pages)
    batch = empty_batch(bucket, cfg)
    segments: list[Segment] = []
    first = _fill_train(items.train, bucket, batch, segments)
    first = _fill_score(items.score, bucket, batch, segments, first)
    first = _fill_prefill(prefill, bucket, cfg, batch, segments, first)
    _fill_decode(decode, bucket, cfg, batch, segments, first)
    owners = [*enumerate(decode), *((bucket.decode + c, r) for c, (r, n) in enumerate(prefill) if ends_prompt(r, n))]
    sample = empty_sample(bucket.samples, cfg) if owners else None
    if sample is not None:
        _fill_sample(sample, owners)
    used = [s for s in segments if s[2]]
    plan = build_plan(used, bucket.rows, num_tiles(bucket), cfg.max_lora_pages, num_wide(bucket))
    return PackedStep(batch.replace(lora=plan), sample, owners)


def ends_prompt(request: ServedRequest, count: int) -> bool:
    """Whether the next `count` tokens complete the request's prompt."""
    return request.num_prefilled + count == len(request.prompt_ids)


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
    chunks: list[Chunk[R]],
    bucket: Bucket,
    cfg: EngineConfig,
    batch: SegmentBatch,
    segments: list[Segment],
    first: int,
) -> int:
    rows, at = batch.prefill, 0
    for c, (request, n) in enumerate(chunks):
        start = request.num_prefilled
        positions = np.arange(start, start + n, dtype=np.int32)
        table = _table(request.kv_pages, cfg.table_columns(bucket))
        rows.tokens[at : at + n] = request.prompt_ids[start : start + n]
        rows.positions[at : at + n] = positions
        rows.kv_page[at : at + n] = table[positions // cfg.kv_page_size]
        rows.kv_offset[at : at + n] = positions % cfg.kv_page_size
        rows.plan.tables[c] = table
        blocks = -(-n // BLOCK)
        b, steps = at // BLOCK, BLOCK * np.arange(blocks, dtype=np.int32)
        rows.plan.block_seq[b : b + blocks] = c
        rows.plan.block_pos[b : b + blocks] = start + steps
        rows.plan.block_len[b : b + blocks] = np.minimum(n - steps, BLOCK)
        rows.last_row[c] = at + n - 1
        segments.append((first + at, n, request.adapter_pages))
        at += blocks * BLOCK
    return first + bucket.prefill


def _fill_decode(
    requests: list[R],
    bucket: Bucket,
    cfg: EngineConfig,
    batch: SegmentBatch,
    segments: list[Segment],
    first: int,
) -> None:
    rows, n = batch.decode, len(requests)
    if rows is not None:
        rows.plan.block_seq[:] = np.arange(bucket.decode)
    if not requests:
        return
    positions = np.array([len(r.prompt_ids) + r.num_dispatched - 1 for r in requests], np.int32)
    columns = cfg.table_columns(bucket)
    tables = np.stack([_table(r.kv_pages, columns) for r in requests])
    rows.slots[:n] = [r.slot for r in requests]
    rows.positions[:n] = rows.plan.block_pos[:n] = positions
    rows.kv_page[:n] = tables[np.arange(n), positions // cfg.kv_page_size]
    rows.kv_offset[:n] = positions % cfg.kv_page_size
    rows.plan.tables[:n] = tables
    rows.plan.block_len[:n] = 1
    at = first
    for pages, group in groupby(requests, key=lambda request: request.adapter_pages):
        count = len(list(group))
        segments.append((at, count, pages))
        at += count


@lru_cache(maxsize=4096)
def _table(pages: tuple[int, ...], columns: int) -> np.ndarray:
    """A row of the page table, without pages beyond the bucket's context; a request's is the same in every step."""
    row = np.zeros(columns, np.int32)
    row[: len(pages)] = pages[:columns]
    return row


def _fill_sample(rows: SampleRows, owners: list[tuple[int, R]]) -> None:
    at, requests = [row for row, _ in owners], [request for _, request in owners]
    rows.slots[at], rows.seed[at] = [r.slot for r in requests], [r.seed for r in requests]
    rows.index[at] = [r.num_dispatched for r in requests]
    params = [r.params for r in requests]
    if all(p.level in ("greedy", "greedy_logprobs") for p in params):
        return
    for name in ("temperature", "top_k", "top_p", "min_p"):
        getattr(rows, name)[at] = [getattr(p, name) for p in params]
    for i, request in owners:
        if request.params.level == "full":
            _fill_penalties(rows, i, request)


def _fill_penalties(rows: SampleRows, i: int, request: ServedRequest) -> None:
    p = request.params
    rows.repetition_penalty[i] = p.repetition_penalty
    rows.presence_penalty[i] = p.presence_penalty
    rows.frequency_penalty[i] = p.frequency_penalty
    for j, (token, value) in enumerate((p.logit_bias or {}).items()):
        rows.bias_ids[i, j], rows.bias[i, j] = token, value
    if request.num_dispatched < p.min_tokens:
        ids = request.stop_ids[:MAX_BANNED]
        rows.banned_ids[i, : len(ids)] = ids
