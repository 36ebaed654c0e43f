"""Paged attention: every implementation against the definition, and what it refuses."""

import dataclasses
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import AttentionPlan, paged_attention, paged_attention_ref
from tests.kernels.paged_attention_cases import CASES, DEVICE_CASES, Case, brute_force, build
from tests.kernels.quick import quick_jit

IMPLEMENTATIONS = {
    "ref": paged_attention_ref,
    "xla": partial(paged_attention, implementation="xla"),
    "triton": partial(paged_attention, implementation="triton"),
}


def check(case: Case, implementation: str) -> None:
    """Against the definition; unused rows are 0."""
    q, k_pages, v_pages, plan = build(case)
    q, k_pages, v_pages = (jnp.asarray(x, case.dtype) for x in (q, k_pages, v_pages))
    options = {"block_rows": case.block_rows, "scale": case.head_dim**-0.5, "window": case.window}
    out = quick_jit(partial(IMPLEMENTATIONS[implementation], **options))(q, k_pages, v_pages, plan)
    assert out.dtype == q.dtype
    expected = brute_force(case, *(np.asarray(x, np.float32) for x in (q, k_pages, v_pages)), plan)
    tolerance = 2e-5 if case.dtype == "float32" else 2e-2
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, rtol=tolerance, atol=tolerance)
    unused = (np.arange(case.block_rows)[None] >= plan.block_len[:, None]).reshape(-1)
    assert not np.asarray(out, np.float32)[unused].any()


SLOW = ("head of 256", "head of 96", "prefill window of one", "decode multi query")
QUICK = [pytest.param(case, marks=pytest.mark.slow) if case.name in SLOW else case for case in CASES]


@pytest.mark.also_gpu
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_matches_the_definition(case: Case, implementation: str) -> None:
    check(case, implementation)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("case", DEVICE_CASES, ids=lambda case: case.name)
def test_real_sizes_match_the_definition(case: Case, implementation: str, dtype: str) -> None:
    check(dataclasses.replace(case, dtype=dtype), implementation)


def arguments(**changes: object) -> dict[str, object]:
    q, k_pages, v_pages, plan = build(CASES[0])
    base: dict[str, object] = {
        "q": jnp.asarray(q), "k_pages": jnp.asarray(k_pages), "v_pages": jnp.asarray(v_pages), "plan": plan,
        "block_rows": 1, "scale": 1.0,
    }
    return base | changes


BLOCKS = np.zeros(5, np.int32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"block_rows": 2}, ValueError, r"q: got 5 rows.*block_rows=2"),
        ({"block_rows": 5}, ValueError, r"plan.block_seq: got shape \(5,\), expected \(1,\)"),
        ({"v_pages": jnp.zeros((8, 16, 2, 16))}, ValueError, r"v_pages: got shape \(8, 16, 2, 16\), expected"),
        ({"q": jnp.zeros((5, 4, 16))}, ValueError, "k_pages: got head_dim 32, expected q's 16"),
        ({"q": jnp.zeros((5, 3, 32))}, ValueError, "q: got 3 heads, expected a multiple of k_pages' 2"),
        ({"q": jnp.zeros((5, 4, 32), jnp.bfloat16)}, TypeError, "k_pages: got dtype float32, expected q's bfloat16"),
        ({"q": jnp.zeros((5, 4))}, ValueError, "q: got shape .* 3 dimensions"),
        ({"window": 0}, ValueError, "window: got 0"),
        ({"implementation": "cuda"}, ValueError, "implementation: got 'cuda'"),
        ({"implementation": "mosaic"}, ValueError, "implementation: got 'mosaic'"),
        (
            {"plan": AttentionPlan(BLOCKS, BLOCKS, BLOCKS.astype(np.int64), BLOCKS[None])}, TypeError,
            "plan.block_len: got dtype int64, expected int32",
        ),
        ({"plan": AttentionPlan(BLOCKS, BLOCKS, BLOCKS, BLOCKS)}, ValueError, "plan.tables: got shape"),
    ],
)
def test_refuses(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        paged_attention(**arguments(**changes))


def test_triton_refuses_a_head_size_that_xla_takes() -> None:
    case = dataclasses.replace(CASES[0], head_dim=20)
    q, k_pages, v_pages, plan = build(case)
    arrays = jnp.asarray(q), jnp.asarray(k_pages), jnp.asarray(v_pages)
    with pytest.raises(NotImplementedError, match="head_dim 20"):
        paged_attention(*arrays, plan, block_rows=1, scale=1.0, implementation="triton")
    out = quick_jit(partial(paged_attention, block_rows=1, scale=20**-0.5))(*arrays, plan)
    np.testing.assert_allclose(out, brute_force(case, q, k_pages, v_pages, plan), rtol=2e-5, atol=2e-5)


def test_no_rows() -> None:
    empty = np.zeros(0, np.int32)
    plan = AttentionPlan(empty, empty, empty, np.zeros((1, 1), np.int32))
    pages = jnp.zeros((2, 16, 2, 32))
    assert paged_attention(jnp.zeros((0, 4, 32)), pages, pages, plan, block_rows=16, scale=1.0).shape == (0, 4, 32)
