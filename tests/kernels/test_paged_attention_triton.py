"""The Triton kernels: every cut gives the same numbers, and every shape class lowers for CUDA."""

import contextlib
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels.paged_attention import AttentionPlan
from pallas_kernels.paged_attention.triton import AttentionConfig, default_config, paged_attention_triton
from tests.kernels.paged_attention_cases import Case, brute_force, build
from tests.tolerances import assert_close


@contextlib.contextmanager
def pretend_gpu() -> Iterator[None]:
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield


SPLIT = (
    Case("decode", ((0, 1), (15, 1), (200, 1), (64, 1)), block_rows=1),
    Case("decode window", ((150, 1), (3, 1), (90, 1)), block_rows=1, window=40),
    Case("prefill", ((0, 40), (130, 16)), window=None),
)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("case", SPLIT, ids=lambda case: case.name)
def test_split_keys_give_the_same_numbers(case: Case, parts: int) -> None:
    q, k_pages, v_pages, plan = build(case)
    config = AttentionConfig(keys=16 if parts > 1 else 128, parts=parts)
    run = partial(
        paged_attention_triton, block_rows=case.block_rows, scale=case.head_dim**-0.5, window=case.window,
        config=config, interpret=True,
    )
    out = jax.jit(run)(*map(jnp.asarray, (q, k_pages, v_pages)), jax.tree.map(jnp.asarray, plan))
    assert_close(out, brute_force(case, q, k_pages, v_pages, plan), "f32")


def test_the_cut_depends_on_static_shapes_only() -> None:
    assert default_config(1, 4, 128, 1024).parts == 1
    assert default_config(1, 4, 128, 16384).parts == 8
    assert default_config(16, 4, 128, 16384).parts == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("window", [None, 512])
@pytest.mark.parametrize(
    ("block_rows", "heads", "kv_heads", "dim", "page_size", "columns"),
    [(1, 32, 8, 128, 16, 41), (1, 32, 8, 128, 16, 1024), (1, 14, 2, 64, 64, 8), (1, 8, 1, 256, 16, 41),
     (1, 32, 32, 96, 16, 41), (16, 32, 8, 128, 16, 41), (16, 28, 4, 128, 32, 20), (16, 8, 1, 256, 16, 41)],
)
def test_lowers_for_cuda(
    block_rows: int, heads: int, kv_heads: int, dim: int, page_size: int, columns: int, window: int | None, dtype: str
) -> None:
    def run(q, k, v, *plan):
        return paged_attention_triton(
            q, k, v, AttentionPlan(*plan), block_rows=block_rows, scale=0.1, window=window, interpret=False
        )

    blocks = jax.ShapeDtypeStruct((4,), np.int32)
    pages = jax.ShapeDtypeStruct((50, page_size, kv_heads, dim), dtype)
    q = jax.ShapeDtypeStruct((4 * block_rows, heads, dim), dtype)
    tables = jax.ShapeDtypeStruct((4, columns), np.int32)
    with pretend_gpu():
        text = jax.jit(run).trace(q, pages, pages, blocks, blocks, blocks, tables).lower(
            lowering_platforms=("cuda",)
        ).as_text()
    launches = text.count("stablehlo.custom_call @__gpu$xla.gpu.triton")
    assert launches == (2 if default_config(block_rows, heads // kv_heads, dim, columns * page_size).parts > 1 else 1)
