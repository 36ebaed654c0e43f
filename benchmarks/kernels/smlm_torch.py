"""What torch does with the SMLM benchmark's cases: `_grouped_mm`, and PEFT's loop over adapters; as CUDA graphs."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.kernels.smlm_chain import CHAIN_MS, POOL_BYTES, Case, slope_us


def time_torch(case: Case) -> dict[str, float]:
    """Microseconds by metric; nothing without torch and a GPU, or for stacked targets."""
    try:
        import torch
    except ImportError:
        return {}
    if not torch.cuda.is_available() or len(case.out_features) > 1 or len(set(case.pages)) > 1:
        return {}
    calls = max(8, min(32, -(-POOL_BYTES // case.adapter_bytes)))
    options = {"device": "cuda", "dtype": torch.bfloat16}
    groups, rank, out = len(case.runs), case.ranks[0], case.out_features[0]
    x = torch.randn(case.rows, case.size, **options)
    y = torch.zeros(case.rows, out, **options)
    A = torch.randn(calls, groups, rank, case.size, **options)
    B = torch.randn(calls, groups, rank, out, **options)
    offsets = torch.tensor(np.cumsum(case.runs), dtype=torch.int32, device="cuda")
    ends = np.cumsum(case.runs).tolist()

    def grouped(a: Any, b: Any) -> None:
        torch._grouped_mm(torch._grouped_mm(x, a.transpose(-2, -1), offs=offsets), b, offs=offsets)

    def peft_loop(a: Any, b: Any) -> None:
        for i, (end, rows) in enumerate(zip(ends, case.runs, strict=True)):
            y[end - rows : end] += (x[end - rows : end] @ a[i].T) @ b[i]

    def each(function: Callable[[Any, Any], None]) -> float:
        def chain() -> None:
            for a, b in zip(A, B, strict=True):
                function(a, b)

        return graph_us(chain, calls)

    us = {"torch_peft_loop_us": each(peft_loop)}
    if hasattr(torch, "_grouped_mm"):
        us["torch_grouped_mm_us"] = each(grouped)
    return us


def graph_us(chain: Callable[[], None], calls: int) -> float:
    """Microseconds of a call, from replays of a CUDA graph.

    Args:
        chain: `calls` calls, one after the other.
        calls: How many they are.
    """
    import torch

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    graph.replay()
    torch.cuda.synchronize()
    start = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    replays = max(1, round(CHAIN_MS / 1e3 / (time.perf_counter() - start)))

    def run(dispatches: int) -> None:
        for _ in range(dispatches * replays):
            graph.replay()
        torch.cuda.synchronize()

    return slope_us(run, replays * calls)
