"""XLA CPU, float32: a row's bits depend on the row and its keys alone. This is what invariants 2 and 5 rest on."""

from functools import partial

import jax
import numpy as np
import pytest

from pallas_kernels.paged_attention import AttentionPlan, paged_attention

pytestmark = pytest.mark.bits
LENGTH = 75
run = jax.jit(partial(paged_attention, implementation="xla"), static_argnames=("block_rows", "scale", "window"))
Sequence = tuple[np.ndarray, np.ndarray, np.ndarray]


def make_sequence(heads: int, kv_heads: int, dim: int, seed: int = 0) -> Sequence:
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=(LENGTH, n, dim)).astype(np.float32) for n in (heads, kv_heads, kv_heads))


def attend(
    sequence: Sequence, blocks: list[tuple[int, int]], block_rows: int, *, page_size: int = 16, columns: int = 5,
    crowd: int = 0, window: int | None = None,
) -> np.ndarray:
    """Rows of `sequence` in blocks of (first row, rows), after `crowd` blocks of another sequence, before padding."""
    q, k, v = sequence
    rng = np.random.default_rng(crowd + columns)
    pages = rng.normal(size=(2, 2 * columns + 1, page_size, *k.shape[1:])).astype(np.float32)
    pages[:, 0] = np.nan
    ids = 1 + rng.permutation(2 * columns)
    for t in range(LENGTH):
        pages[:, ids[t // page_size], t % page_size] = k[t], v[t]
    tables = np.stack([ids[columns:], ids[:columns]]).astype(np.int32)
    work = [(0, 3 * i, 1) for i in range(crowd)] + [(1, *block) for block in blocks] + [(0, 0, 0)] * crowd
    rows = rng.normal(size=(len(work) * block_rows, *q.shape[1:])).astype(np.float32)
    for i, (first, count) in enumerate(blocks, start=crowd):
        rows[i * block_rows : i * block_rows + count] = q[first : first + count]
    plan = AttentionPlan(*(np.array(column, np.int32) for column in zip(*work, strict=True)), tables)
    out = np.asarray(run(rows, *pages, plan, block_rows=block_rows, scale=q.shape[-1] ** -0.5, window=window))
    return np.concatenate([out[i * block_rows :][:n] for i, (_, n) in enumerate(blocks, start=crowd)])


def tiled(first: int, step: int) -> list[tuple[int, int]]:
    """Blocks over the whole sequence, the first one `first` rows long."""
    starts = [0, *range(first, LENGTH, step)] if first else list(range(0, LENGTH, step))
    return [(a, b - a) for a, b in zip(starts, [*starts[1:], LENGTH], strict=True)]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window"),
    [
        (4, 1, 32, None),
        pytest.param(8, 2, 64, 21, marks=pytest.mark.slow),
        *(pytest.param(*shape, marks=pytest.mark.slow) for shape in ((4, 4, 16, None), (2, 1, 80, None))),
    ],
)
def test_a_row_has_one_result(heads: int, kv_heads: int, dim: int, window: int | None) -> None:
    sequence = make_sequence(heads, kv_heads, dim)
    attend_ = partial(attend, sequence, window=window)
    expected = attend_(tiled(0, 16), 16)
    decode = [(t, 1) for t in range(LENGTH)]
    same = {
        "other blocks": attend_(tiled(5, 16), 16),
        "a crowd": attend_(tiled(5, 16), 16, crowd=3),
        "a wider table": attend_(tiled(0, 16), 16, columns=37),
        "larger pages": attend_(tiled(0, 16), 16, page_size=64, columns=3),
        "decode": attend_(decode, 1),
        "decode in a crowd, wider table": attend_(decode, 1, columns=9, crowd=4),
    }
    for name, out in same.items():
        np.testing.assert_array_equal(out, expected, err_msg=name)
    alone = attend_([(LENGTH - 1, 1)], 1, columns=9)
    np.testing.assert_array_equal(alone, expected[-1:], err_msg="one row alone")


def test_long_tables_are_read_in_chunks_of_blocks() -> None:
    sequence = make_sequence(4, 2, 32)
    decode = [(t, 1) for t in range(LENGTH)]
    np.testing.assert_array_equal(attend(sequence, decode, 1, columns=64), attend(sequence, tiled(0, 16), 16))
