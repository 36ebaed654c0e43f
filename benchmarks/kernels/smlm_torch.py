"""What torch does with the SMLM benchmark's cases: `_grouped_mm`, and PEFT's loop over adapters; as CUDA graphs."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.kernels.smlm_chain import POOL_BYTES, Case


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

    us = {"torch_peft_loop_us": _graph_us(peft_loop, A, B)}
    if hasattr(torch, "_grouped_mm"):
        us["torch_grouped_mm_us"] = _graph_us(grouped, A, B)
    return us


def _graph_us(function: Callable[[Any, Any], None], A: Any, B: Any, replays: int = 8) -> float:
    """Microseconds of a call, from replays of a graph that holds one call per (A[i], B[i])."""
    import torch

    def chain() -> None:
        for a, b in zip(A, B, strict=True):
            function(a, b)

    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(replays):
            graph.replay()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / (replays * len(A)))
    return sorted(times)[2] * 1e6
