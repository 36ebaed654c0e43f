"""The Triton kernels: every cut gives the same numbers, and two shape classes lower for CUDA."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import AttentionPlan
from pallas_kernels.paged_attention.triton import AttentionConfig, attention_config, paged_attention_triton
from tests.kernels.paged_attention_cases import Case, brute_force, build
from tests.kernels.quick import quick_jit
from tests.tolerances import assert_close

SPLIT = (
    Case("decode", ((0, 1), (15, 1), (200, 1), (64, 1)), block_rows=1),
    Case("decode window", ((150, 1), (3, 1), (90, 1)), block_rows=1, window=40),
    Case("prefill", ((0, 40), (130, 16)), window=None),
)


@pytest.mark.parametrize(
    ("case", "parts"), [*((case, 3) for case in SPLIT), (SPLIT[0], 1)], ids=lambda value: getattr(value, "name", None)
)
def test_split_keys_give_the_same_numbers(case: Case, parts: int) -> None:
    q, k_pages, v_pages, plan = build(case)
    config = AttentionConfig(keys=16 if parts > 1 else 128, parts=parts)
    run = partial(
        paged_attention_triton, block_rows=case.block_rows, scale=case.head_dim**-0.5, window=case.window,
        config=config, interpret=True,
    )
    out = quick_jit(run)(*map(jnp.asarray, (q, k_pages, v_pages)), jax.tree.map(jnp.asarray, plan))
    assert_close(out, brute_force(case, q, k_pages, v_pages, plan), "f32")


def test_the_cut_depends_on_static_shapes_only() -> None:
    assert attention_config(1, 4, 128, 1024).parts == 1
    assert attention_config(1, 4, 128, 16384).parts == 8
    assert attention_config(16, 4, 128, 16384).parts == 1


@pytest.mark.parametrize(
    ("block_rows", "heads", "kv_heads", "dim", "page_size", "columns", "window", "dtype"),
    [(1, 32, 8, 128, 16, 1024, None, "bfloat16"), (16, 28, 4, 96, 32, 20, 512, "float32")],
    ids=["decode_split_bf16", "prefill_window_f32"],
)
def test_lowers_for_cuda(
    block_rows: int, heads: int, kv_heads: int, dim: int, page_size: int, columns: int, window: int | None, dtype: str,
    lower_for_cuda: Callable[..., str],
) -> None:  # fmt: skip
    def run(q, k, v, *plan):
        return paged_attention_triton(
            q, k, v, AttentionPlan(*plan), block_rows=block_rows, scale=0.1, window=window, interpret=False
        )

    blocks = jax.ShapeDtypeStruct((4,), np.int32)
    pages = jax.ShapeDtypeStruct((50, page_size, kv_heads, dim), dtype)
    q = jax.ShapeDtypeStruct((4 * block_rows, heads, dim), dtype)
    tables = jax.ShapeDtypeStruct((4, columns), np.int32)
    text = lower_for_cuda(run, q, pages, pages, blocks, blocks, blocks, tables)
    launches = text.count("stablehlo.custom_call @__gpu$xla.gpu.triton")
    parts = attention_config(block_rows, heads // kv_heads, dim, columns * page_size).parts
    assert launches == (2 if parts > 1 else 1)
    assert (parts > 1) == (block_rows == 1), "both forms are meant to be lowered"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", SPLIT, ids=lambda case: case.name)
def test_a_sequence_keeps_its_bits_beside_nan(case: Case, dtype: str) -> None:
    """The first sequence becomes NaN, keys, values and queries: no bit of another moves."""
    q, k_pages, v_pages, plan = build(case)
    options = {"block_rows": case.block_rows, "scale": case.head_dim**-0.5, "window": case.window}
    run = jax.jit(partial(paged_attention_triton, **options))
    rows = np.repeat(plan.block_seq == 1, case.block_rows)
    pages = plan.tables[1][plan.tables[1] > 0]
    clean = np.asarray(run(*(jnp.asarray(a, dtype) for a in (q, k_pages, v_pages)), plan))
    q[rows], k_pages[pages], v_pages[pages] = np.nan, np.nan, np.nan
    dirty = np.asarray(run(*(jnp.asarray(a, dtype) for a in (q, k_pages, v_pages)), plan))
    np.testing.assert_array_equal(dirty[~rows], clean[~rows])
    assert np.isnan(dirty[rows].astype(np.float32)).any()
