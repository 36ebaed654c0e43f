"""The plan lists every row of an adapter once; bounds are met; bad segments are refused."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.smlm import TILE, WIDE, build_plan, num_tiles_bound, num_wide_bound, pack_plan, plan_shapes


def layouts(rows: int) -> st.SearchStrategy:
    runs = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 4), st.integers(0, 2)), max_size=12)
    return runs.map(lambda runs: place(runs, rows))


def place(runs: list[tuple[int, int, int]], rows: int) -> list[tuple[int, int, tuple[int, ...]]]:
    segments, first = [], 0
    for length, adapter, gap in runs:
        if first + length > rows:
            break
        # Adapter a owns pages 10a+1 to 10a+a; adapter 0 is none.
        segments.append((first, length, tuple(10 * adapter + 1 + m for m in range(adapter))))
        first += length + gap
    return segments


@given(layouts(200))
def test_every_row_of_an_adapter_is_in_one_tile_of_its_pages(segments: list) -> None:
    plan = build_plan(segments, 200, 200, 5)
    want = np.zeros((200, 5), np.int32)
    for first, rows, pages in segments:
        want[first : first + rows, : len(pages)] = pages
    for height, row, length, pages, used in (
        (TILE, plan.tile_row, plan.tile_len, plan.tile_pages, plan.used[0]),
        (WIDE, plan.wide_row, plan.wide_len, plan.wide_pages, plan.used[2]),
    ):
        got, times = np.zeros((200, 5), np.int32), np.zeros(200, np.int32)
        for tile in range(used):
            here = slice(row[tile], row[tile] + length[tile])
            assert 0 < length[tile] <= height
            assert pages[tile].any() == (height == TILE or tile < plan.used[1])
            got[here] = pages[tile]
            times[here] += 1
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(times, want.any(axis=1) if height == TILE else 1)
        assert not length[used:].any() and not pages[used:].any() and not row[used:].any()
    for t, slot in enumerate(plan.row_slot):
        if want[t].any():
            assert plan.tile_row[slot // TILE] + slot % TILE == t
        else:
            assert slot == -1


@given(layouts(200))
def test_the_bound_suffices(segments: list) -> None:
    kept = [(first, rows, pages) for first, rows, pages in segments if rows and pages]
    tiles, wide = (bound([200], [len(kept)]) for bound in (num_tiles_bound, num_wide_bound))
    build_plan(segments, 200, tiles, 5, wide)


def test_the_bound_is_reached() -> None:
    segments = [(0, 1, (1,)), (1, 1, (2,)), (2, 30, (3,))]  # 1 + 1 + 2 tiles
    assert num_tiles_bound([32], [3]) == 4
    assert build_plan(segments, 32, 4, 1).used.tolist() == [4, 3, 3]
    assert num_tiles_bound([1024, 512, 32], [1, 2, 8]) == 64 + 33 + 9
    assert num_tiles_bound([0], [5]) == num_tiles_bound([8], [0]) == 1
    assert num_tiles_bound([1024, 512, 32], [1, 2, 8], WIDE) == 16 + 9 + 8
    assert num_wide_bound([1024, 512, 32], [1, 2, 8]) == (3 + 15) + (5 + 7) + 17
    with pytest.raises(ValueError, match="num_wide: got 2, expected at least 3"):
        build_plan(segments, 32, 4, 1, num_wide=2)
    with pytest.raises(ValueError, match="got 1 parts, expected 2"):
        num_tiles_bound([1, 2], [1])


def test_neighbours_of_one_adapter_share_tiles() -> None:
    plan = build_plan([(t, 1, (4, 5)) for t in range(20)], 20, 2, 2)
    assert plan.tile_len.tolist() == [16, 4]
    assert plan.row_slot.tolist() == list(range(20))


def test_shapes_for_compiling_ahead() -> None:
    plan = build_plan([], 20, 7, 2)
    shapes = plan_shapes(20, 7, 2)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), plan) == jax.tree.map(lambda s: (s.shape, s.dtype), shapes)
    assert plan.train_rows == shapes.train_rows == 0


@pytest.mark.parametrize("rows", [16, 40, 64, 150])
def test_a_plan_of_packs_lists_the_rows_that_the_host_would(rows: int) -> None:
    pages = np.array([[3, 1], [0, 0], [2, 0]], np.int32)
    segments = [(g * rows, rows, tuple(p for p in own if p)) for g, own in enumerate(pages.tolist())]
    plan, want = pack_plan(pages, rows), build_plan(segments, 3 * rows, 60, 2)
    assert (plan.train_rows, plan.pack_rows) == (3 * rows, rows)
    np.testing.assert_array_equal(plan.pack_pages, pages)
    for name in ("tile", "wide"):
        found = [[np.asarray(getattr(p, f"{name}_{part}")) for part in ("row", "len", "pages")] for p in (plan, want)]
        got, listed = ({(row, n, *own) for row, n, own in zip(*map(list, p), strict=True) if n} for p in found)
        assert {tuple(map(int, tile)) for tile in got} == {tuple(map(int, tile)) for tile in listed}
    for t, slot in enumerate(np.asarray(plan.row_slot)):
        assert slot == -1 if rows <= t < 2 * rows else plan.tile_row[slot // TILE] + slot % TILE == t


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([(0, 33, (1,))], r"segments\[0\]: got rows 0 to 33, expected within num_rows=32"),
        ([(-1, 3, (1,))], r"segments\[0\]: got rows -1 to 2"),
        ([(0, 4, (1, 2, 3))], "got 3 pages, expected at most max_pages=2"),
        ([(0, 4, (0,))], r"got pages \(0,\), expected distinct page numbers >= 1"),
        ([(0, 4, (2, 2))], r"got pages \(2, 2\), expected distinct"),
        ([(0, 4, (1,)), (3, 4, (2,))], "row 3 is in two segments"),
        ([(t, 1, (t + 1,)) for t in range(5)], "num_tiles: got 4, expected at least 5"),
    ],
)
def test_bad_segments_are_refused(segments: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_plan(segments, 32, 4, 2)
