"""The Triton backward of any plan: CUDA for one shape class, and blocks that fit."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.smlm import num_tiles_bound, num_wide_bound, plan_shapes
from pallas_kernels.smlm.pack_tuning import MAX_SHARED_BYTES, default_runs_dy_config, default_x_config
from pallas_kernels.smlm.runs import backward_runs


@pytest.mark.parametrize("pages", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_lowers_for_cuda(pages: int, lower_for_cuda: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Random segments of 1,024 rows, qkv of an 8B model: two launches, dX in place of dx."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    rows, size, outs, dtype = 1024, 4096, (4096, 1024, 1024), jnp.bfloat16
    plan = plan_shapes(rows, num_tiles_bound([rows], [32]), pages, num_wide_bound([rows], [32]))
    shapes = [(rows, 3, pages, 16), (rows, size), (65, 48, size), (65, 16, sum(outs)), (rows, sum(outs)), (rows, size)]
    S, x, A, B, dy, dx = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)

    def f(S: Any, x: Any, A: Any, B: Any, plan: Any, dy: Any, dx: Any) -> Any:
        return backward_runs(S, x, A, B, plan, dy, out_features=outs, dx=dx)

    text = lower_for_cuda(f, S, x, A, B, plan, dy, dx, donate_argnums=6)
    assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 2
    assert text.count("output_operand_aliases") == 1


@pytest.mark.parametrize("pages", [1, 4, 8])
@pytest.mark.parametrize("outs", [(4096,), (4096, 1024, 1024), (14336, 14336)])
def test_default_blocks_fit_the_device(outs: tuple[int, ...], pages: int) -> None:
    ranks = pages * 16
    for dtype in (jnp.bfloat16, jnp.float32):
        config = default_runs_dy_config(outs, pages, dtype)
        assert config.shared_bytes(ranks, dtype) <= MAX_SHARED_BYTES
        assert config.dS.rows <= 64
        stacked = ranks * len(outs)
        assert default_x_config(stacked, dtype).shared_bytes(stacked, dtype) <= MAX_SHARED_BYTES
