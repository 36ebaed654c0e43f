"""Requests in the middle of their life, for what measures single steps."""

from collections.abc import Sequence

import numpy as np

from loquetier_jax.batch.pack import StepItems, TrainItem
from loquetier_jax.batch.packs import Pack
from loquetier_jax.config import EngineConfig
from loquetier_jax.sampling_params import SamplingParams
from loquetier_jax.serve.output import RequestMetrics
from loquetier_jax.serve.request import Request

GREEDY = SamplingParams(temperature=0, max_tokens=64)


def running(
    slot: int,
    adapter_pages: Sequence[int],
    kv_pages: Sequence[int],
    params: SamplingParams,
    prompt: Sequence[int],
    produced: int = 0,
) -> Request:
    """One that has a slot and pages; with `produced` tokens its next row is a decode row, with 0 it is its prompt."""
    return Request(
        id=str(slot),
        request_id=str(slot),
        prompt_ids=tuple(prompt),
        params=params,
        seed=slot,
        metrics=RequestMetrics(0.0),
        slot=slot,
        adapter_pages=tuple(adapter_pages),
        kv_pages=tuple(kv_pages),
        num_prefilled=len(prompt) if produced else 0,
        num_dispatched=produced,
    )


def decode_items(
    cfg: EngineConfig, rows: int, adapters: int, context: int, first_slot: int = 0, first_page: int = 1
) -> list[Request]:
    """`rows` sequences at position context - 1, in equal shares of `adapters` adapters (0: the base)."""
    items, per = [], cfg.max_pages_per_seq
    for i in range(rows):
        slot = first_slot + i
        kv = tuple(range(1 + slot * per, 1 + (slot + 1) * per))
        pages = (first_page + i * adapters // rows,) if adapters else ()
        items.append(running(slot, pages, kv, GREEDY, [5] * (context - 1), 1))
    return items


def mixed_items(cfg: EngineConfig, vocab: int, pack: int, prefill: int, rows: int, context: int) -> StepItems:
    """One pack of adapter 1, two chunks of adapters 2 and 3, decode rows of eight more."""
    rng = np.random.default_rng(0)
    ids = rng.integers(2, vocab, pack + 1).astype(np.int32)
    one, steps = np.ones(pack, np.float32), np.arange(pack, dtype=np.int32)
    train = Pack(
        tokens=ids[:-1], targets=ids[1:], positions=steps, segments=np.zeros(pack, np.int32), weights=one,
        drop_keys=np.zeros(pack, np.uint32), num_targets=pack, num_tokens=pack, step=0, index=0, is_last=True,
        sample_ids=(0,),
    )  # fmt: skip
    per, chunks = cfg.max_pages_per_seq, []
    for c in range(2):
        kv = tuple(range(1 + c * per, 1 + (c + 1) * per))
        prompt = rng.integers(2, vocab, prefill // 2).tolist()
        chunks.append((running(c, (2 + c,), kv, GREEDY, prompt), len(prompt)))
    decode = decode_items(cfg, rows, 8, context, first_slot=2, first_page=4)
    return StepItems(train=[TrainItem(train, (1,), (1,))], prefill=chunks, decode=decode)
