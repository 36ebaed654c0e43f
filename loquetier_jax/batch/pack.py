"""From what the scheduler chose to the numpy batch of one step: rows grouped by adapter once, on the host."""

from collections.abc import Sequence
from dataclasses import dataclass, field
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


class ServedRequest(Protocol):
    """What the rows of a request need to know of it; `serve.request.Request` is one, see its attributes."""

    slot: int | None
    adapter_pages: AdapterPages
    kv_pages: Sequence[int]
    params: SamplingParams
    seed: int
    prompt_ids: Sequence[int]
    num_prefilled: int
    num_dispatched: int

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end it, which min_tokens holds back."""


R = TypeVar("R", bound=ServedRequest)
Chunk = tuple[R, int]
"""The next so many tokens of a request's prompt; the last of them samples its first token."""


@dataclass
class StepItems(Generic[R]):
    """Everything one step carries, before it has a shape.

    Attributes:
        train, score: Packs.
        prefill: Pieces of prompts.
        decode: Requests that get their next token.
    """

    train: list[TrainItem] = field(default_factory=list)
    score: list[ScoreItem] = field(default_factory=list)
    prefill: list[Chunk[R]] = field(default_factory=list)
    decode: list[R] = field(default_factory=list)


class PackedStep(NamedTuple, Generic[R]):
    """A step in its shape, numpy.

    Attributes:
        batch: For the forward.
        sample: For the sampler; None when no token is drawn.
        owners: (sample row, request) of every row from which a token is drawn, in order.
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
    for row, request in owners:
        _fill_sample(sample, row, request)
    used = [s for s in segments if s[2]]
    plan = build_plan(used, bucket.rows, num_tiles(bucket), cfg.max_lora_pages, num_wide(bucket))
    return PackedStep(batch.replace(lora=plan), sample, owners)


def ends_prompt(request: ServedRequest, count: int) -> bool:
    """Whether the next `count` tokens of its prompt are the last ones."""
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
        table = np.asarray(request.kv_pages, np.int32)
        rows.tokens[at : at + n] = request.prompt_ids[start : start + n]
        rows.positions[at : at + n] = positions
        rows.kv_page[at : at + n] = table[positions // cfg.kv_page_size]
        rows.kv_offset[at : at + n] = positions % cfg.kv_page_size
        rows.plan.tables[c, : len(table)] = table
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
    rows = batch.decode
    for i, request in enumerate(requests):
        table, position = np.asarray(request.kv_pages, np.int32), len(request.prompt_ids) + request.num_dispatched - 1
        rows.slots[i] = request.slot
        rows.positions[i] = position
        rows.kv_page[i] = table[position // cfg.kv_page_size]
        rows.kv_offset[i] = position % cfg.kv_page_size
        rows.plan.tables[i, : len(table)] = table
        rows.plan.block_pos[i] = position
        rows.plan.block_len[i] = 1
    if rows is not None:
        rows.plan.block_seq[:] = np.arange(bucket.decode)
    at = first
    for pages, group in groupby(requests, key=lambda request: request.adapter_pages):
        n = len(list(group))
        segments.append((at, n, pages))
        at += n


def _fill_sample(rows: SampleRows, i: int, request: ServedRequest) -> None:
    p = request.params
    rows.slots[i], rows.index[i], rows.seed[i] = request.slot, request.num_dispatched, request.seed
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
    if request.num_dispatched < p.min_tokens:
        ids = request.stop_ids[:MAX_BANNED]
        rows.banned_ids[i, : len(ids)] = ids
