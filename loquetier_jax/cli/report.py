"""What a replay comes to, under the names of `vllm bench serve --save-result`. Imports no jax."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from loquetier_jax.cli.replay import Served
from loquetier_jax.config import SLOConfig

if TYPE_CHECKING:
    from loquetier_jax.serve.output import RequestMetrics

ENDS = ("stop", "length")  # how a completed request finishes
LATENCIES = ("ttft", "tpot", "itl", "e2el")


def summarize(served: Sequence[Served], duration: float, slo: SLOConfig, *, details: bool = False) -> dict[str, Any]:
    """All figures of a replay.

    Args:
        served: All requests, finished or refused.
        duration: Seconds from the start of the replay to its last token.
        slo: The promise; a request keeps it when its TTFT and its TPOT do.
        details: Whether to add the lists `input_lens, output_lens, ttfts, itls, errors`, in order of arrival.

    Returns:
        vllm bench's keys (times in ms, throughputs per second); `request_goodput` and `slo_attainment` only with a
        promise; `adapters`: the counts and latencies of each; `failures`: how many requests failed for each reason,
        most frequent first; a statistic of nothing is None.
    """
    done = [s for s in served if _completed(s)]
    tokens = {s.submitted.request_id: _lengths(s) for s in done}
    total_in, total_out = (sum(t[i] for t in tokens.values()) for i in (0, 1))
    result = {
        "duration": duration,
        "completed": len(done),
        "failed": len(served) - len(done),
        "failures": dict(Counter(_reason(s) for s in served if not _completed(s)).most_common()),
        "total_input_tokens": total_in,
        "total_output_tokens": total_out,
        "request_throughput": len(done) / duration,
        "output_throughput": total_out / duration,
        "total_token_throughput": (total_in + total_out) / duration,
        **latencies(done),
    }
    if slo.ttft_ms is not None or slo.tpot_ms is not None:
        kept = sum(keeps(s.submitted.requests[0].metrics, slo) for s in done)
        result["request_goodput"] = kept / duration
        result["slo_attainment"] = kept / len(served) if served else None
        result["slo"] = {"ttft_ms": slo.ttft_ms, "tpot_ms": slo.tpot_ms}
    names = sorted({s.arrival.adapter for s in done})
    result["adapters"] = {name: _of_adapter([s for s in done if s.arrival.adapter == name]) for name in names}
    return result | (_details(served) if details else {})


def _completed(served: Served) -> bool:
    return served.submitted is not None and all(
        r.finish_reason in ENDS for r in served.submitted.requests
    )


def _lengths(served: Served) -> tuple[int, int]:
    requests = served.submitted.requests
    return len(requests[0].prompt_ids), sum(len(r.output_ids) for r in requests)


def _of_adapter(served: Sequence[Served]) -> dict[str, Any]:
    return {"completed": len(served), "total_output_tokens": sum(_lengths(s)[1] for s in served)} | latencies(served)


def keeps(metrics: "RequestMetrics", slo: SLOConfig) -> bool:
    """Whether a finished request kept the promise."""
    pairs = ((metrics.ttft, slo.ttft_ms), (metrics.tpot, slo.tpot_ms))
    return all(promise is None or value is None or 1e3 * value <= promise for value, promise in pairs)


def latencies(served: Sequence[Served]) -> dict[str, float | None]:
    """{mean, median, std, p90, p99}_{ttft, tpot, itl, e2el}_ms over completed requests (itl: over all gaps)."""
    found: dict[str, list[float]] = {name: [] for name in LATENCIES}
    for metrics in (r.metrics for s in served for r in s.submitted.requests):
        found["ttft"].append(metrics.ttft)
        found["tpot"] += [] if metrics.tpot is None else [metrics.tpot]
        found["itl"] += metrics.itl
        found["e2el"].append(metrics.finished_time - metrics.arrival_time)
    return {key: value for name, values in found.items() for key, value in _statistics(name, values).items()}


def _statistics(name: str, seconds: list[float]) -> dict[str, float | None]:
    keys = ("mean", "median", "std", "p90", "p99")
    if not seconds:
        return {f"{key}_{name}_ms": None for key in keys}
    ms = 1e3 * np.asarray(seconds)
    values = (ms.mean(), np.median(ms), ms.std(), np.percentile(ms, 90), np.percentile(ms, 99))
    return {f"{key}_{name}_ms": float(value) for key, value in zip(keys, values, strict=True)}


def _details(served: Sequence[Served]) -> dict[str, list[Any]]:
    first = [s.submitted.requests[0] if s.submitted else None for s in served]
    return {
        "input_lens": [len(r.prompt_ids) if r else 0 for r in first],
        "output_lens": [len(r.output_ids) if r else 0 for r in first],
        "ttfts": [r.metrics.ttft if r else None for r in first],
        "itls": [r.metrics.itl if r else [] for r in first],
        "errors": ["" if _completed(s) else _reason(s) for s in served],
    }


def _reason(served: Served) -> str:
    """Why a request that was not completed was not."""
    if served.submitted is None:
        return str(served.error)
    failed = next(r for r in served.submitted.requests if r.finish_reason not in ENDS)
    return str(failed.stop_reason or failed.finish_reason)
