"""One case table of paged attention, and a builder that poisons everything a row may not see."""

from dataclasses import dataclass

import numpy as np

from pallas_kernels.paged_attention import AttentionPlan


@dataclass(frozen=True)
class Case:
    """Sequences as chunks of query rows over a cache.

    Attributes:
        chunks: (position of the chunk's first row, rows) of each sequence.
        spare_blocks: Padding blocks at the end.
        spare_columns: Columns of the table beyond the longest sequence.
    """

    name: str
    chunks: tuple[tuple[int, int], ...]
    block_rows: int = 16
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    page_size: int = 16
    window: int | None = None
    spare_blocks: int = 1
    spare_columns: int = 1
    dtype: str = "float32"


CASES = (
    Case("decode", ((0, 1), (15, 1), (16, 1), (40, 1)), block_rows=1),
    Case("decode one key", ((0, 1),), block_rows=1, kv_heads=4, spare_blocks=0),
    Case("decode multi query", ((33, 1), (7, 1)), block_rows=1, kv_heads=1, head_dim=64),
    Case("decode bf16", ((33, 1), (64, 1)), block_rows=1, heads=8, head_dim=64, page_size=32, dtype="bfloat16"),
    Case("prefill", ((0, 40), (0, 16), (0, 1))),
    Case("prefill later chunk, off page", ((21, 35), (5, 3))),
    Case("prefill window", ((0, 50), (30, 20)), window=13),
    Case("prefill window of one", ((4, 20),), window=1),
    Case("group of three", ((10, 30),), heads=6, head_dim=64),
    Case("head of 96", ((10, 20),), heads=2, kv_heads=1, head_dim=96),
    Case("head of 256", ((10, 20),), heads=2, kv_heads=1, head_dim=256),
    Case("prefill bf16", ((21, 35), (0, 20)), head_dim=64, window=24, dtype="bfloat16"),
    Case("padding only", (), spare_blocks=2),
)


DEVICE_CASES = (
    Case("decode", tuple((97 * i, 1) for i in range(11)), block_rows=1, heads=32, kv_heads=8, head_dim=128),
    Case("decode window", ((3000, 1), (5, 1)), block_rows=1, heads=32, kv_heads=8, head_dim=128, window=512),
    Case("decode many keys", ((6000, 1), (700, 1)), block_rows=1, heads=32, kv_heads=8, head_dim=128),
    Case("decode odd group", ((500, 1), (64, 1)), block_rows=1, heads=14, head_dim=64, page_size=64),
    Case("decode multi query", ((500, 1), (64, 1)), block_rows=1, heads=8, kv_heads=1, head_dim=256),
    Case("decode head of 96", ((500, 1), (64, 1)), block_rows=1, heads=32, kv_heads=32, head_dim=96),
    Case("prefill", ((0, 200), (300, 130), (17, 1)), heads=32, kv_heads=8, head_dim=128),
    Case("prefill window", ((600, 200), (0, 90)), heads=32, kv_heads=8, head_dim=128, window=512),
    Case("prefill odd group", ((100, 90),), heads=28, kv_heads=4, head_dim=128, page_size=32),
    Case("prefill multi query", ((100, 90),), heads=8, kv_heads=1, head_dim=256),
)
"""Of real models' sizes."""


def build(case: Case, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, AttentionPlan]:
    """(q, k_pages, v_pages, plan), float32. Unused rows, page tails, unused pages and page 0 hold NaN."""
    rng = np.random.default_rng(seed)
    size = case.page_size
    counts = [-(-(start + rows) // size) for start, rows in case.chunks]
    columns = max(counts, default=1) + case.spare_columns
    pages = 1 + sum(counts) + 2
    k_pages = np.full((pages, size, case.kv_heads, case.head_dim), np.nan, np.float32)
    v_pages = k_pages.copy()
    ids = 1 + rng.permutation(pages - 1)
    tables = np.zeros((max(1, len(case.chunks)) + 1, columns), np.int32)  # row 0 is nobody's
    blocks: list[tuple[int, int, int]] = []
    for number, ((start, rows), count) in enumerate(zip(case.chunks, counts, strict=True)):
        own, ids = ids[:count], ids[count:]
        tables[number + 1, :count] = own
        for t in range(start + rows):
            k_pages[own[t // size], t % size] = rng.normal(size=k_pages.shape[2:])
            v_pages[own[t // size], t % size] = rng.normal(size=k_pages.shape[2:])
        step = case.block_rows
        blocks += [(number + 1, start + at, min(step, rows - at)) for at in range(0, rows, step)]
    blocks += [(0, 0, 0)] * case.spare_blocks
    q = np.full((len(blocks) * case.block_rows, case.heads, case.head_dim), np.nan, np.float32)
    for index, (_, _, length) in enumerate(blocks):
        first = index * case.block_rows
        q[first : first + length] = rng.normal(size=(length, *q.shape[1:]))
    seq, pos, length = (np.array(column, np.int32) for column in zip(*blocks, strict=True))
    return q, k_pages, v_pages, AttentionPlan(seq, pos, length, tables)


def brute_force(case: Case, q: np.ndarray, k_pages: np.ndarray, v_pages: np.ndarray, plan: AttentionPlan) -> np.ndarray:
    """The definition again, in numpy float64, one row and kv head at a time."""
    out = np.zeros(q.shape, np.float64)
    group = case.heads // case.kv_heads
    for block, (seq, pos, length) in enumerate(zip(plan.block_seq, plan.block_pos, plan.block_len, strict=True)):
        for offset in range(length):
            last = pos + offset
            first = 0 if case.window is None else max(0, last - case.window + 1)
            t = np.arange(first, last + 1)
            where = plan.tables[seq, t // case.page_size], t % case.page_size
            k, v = (pages[where].astype(np.float64) for pages in (k_pages, v_pages))
            row = block * case.block_rows + offset
            for head in range(case.kv_heads):
                heads = slice(head * group, (head + 1) * group)
                scores = q[row, heads].astype(np.float64) @ k[:, head].T * case.head_dim**-0.5
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                out[row, heads] = weights @ v[:, head] / weights.sum(axis=1, keepdims=True)
    return out
