"""Summarises a replay, with the names of `vllm bench serve --save-result`. Imports no jax."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from loquetier_jax.cli.replay import Served
from loquetier_jax.config import SLOConfig

if TYPE_CHECKING:
    from loquetier_jax.serve.output import RequestMetrics

ENDS = ("stop", "length")  # finish reasons of completed requests
LATENCIES = ("ttft", "tpot", "itl", "e2el")


def summarize(served: Sequence[Served], duration: float, slo: SLOConfig, *, details: bool = False) -> dict[str, Any]:
    """All metrics of a replay.

    Args:
        served: All requests, finished or refused.
        duration: Seconds from the start of the replay to its last token.
        slo: Latency targets; a request attains them if its TTFT, TPOT and p99 ITL are all within their targets.
        details: Whether to add the lists `input_lens, output_lens, ttfts, itls, errors`, in order of arrival.

    Returns:
        vllm bench's keys (times in ms, throughputs per second); `total_cached_tokens`: input tokens found in the prefix
        cache; with latency targets also `request_goodput`, `slo_attainment`, `slo` (the targets) and `slo_missed`
        (completed requests that missed each); `adapters`: counts, latencies and attainment per adapter; `failures`:
        reason -> number of requests, most frequent first.
        Statistics over no requests are None.
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
        "total_cached_tokens": sum(s.submitted.requests[0].metrics.num_cached_tokens for s in done),
        "request_throughput": len(done) / duration,
        "output_throughput": total_out / duration,
        "total_token_throughput": (total_in + total_out) / duration,
        **latencies(done),
    }
    if slo.promised:
        misses = [missed(s.submitted.requests[0].metrics, slo) for s in done]
        result["request_goodput"] = misses.count([]) / duration
        result["slo_attainment"] = _attainment(served, slo)
        result["slo"] = slo.promised
        result["slo_missed"] = {name: sum(name in one for one in misses) for name in slo.promised}
    names = sorted({s.arrival.adapter for s in served})
    result["adapters"] = {name: _of_adapter([s for s in served if s.arrival.adapter == name], slo) for name in names}
    return result | (_details(served) if details else {})


def _completed(served: Served) -> bool:
    return served.submitted is not None and all(
        r.finish_reason in ENDS for r in served.submitted.requests
    )


def _lengths(served: Served) -> tuple[int, int]:
    requests = served.submitted.requests
    return len(requests[0].prompt_ids), sum(len(r.output_ids) for r in requests)


def _of_adapter(served: Sequence[Served], slo: SLOConfig) -> dict[str, Any]:
    done = [s for s in served if _completed(s)]
    return {
        "completed": len(done),
        "failed": len(served) - len(done),
        "total_output_tokens": sum(_lengths(s)[1] for s in done),
        **({"slo_attainment": _attainment(served, slo)} if slo.promised else {}),
        **latencies(done),
    }


def _attainment(served: Sequence[Served], slo: SLOConfig) -> float | None:
    """Fraction of all requests that completed within the targets; None without requests."""
    kept = sum(not missed(s.submitted.requests[0].metrics, slo) for s in served if _completed(s))
    return kept / len(served) if served else None


def missed(metrics: "RequestMetrics", slo: SLOConfig) -> list[str]:
    """Names of the targets that a finished request missed; a single token cannot miss TPOT or ITL."""
    values = {"ttft_ms": metrics.ttft, "tpot_ms": metrics.tpot}
    values["itl_p99_ms"] = float(np.percentile(metrics.itl, 99)) if metrics.itl else None
    return [name for name, most in slo.promised.items() if values[name] is not None and 1e3 * values[name] > most]


def latencies(served: Sequence[Served]) -> dict[str, float | None]:
    """{mean, median, std, p90, p99}_{ttft, tpot, itl, e2el}_ms over completed requests (for itl, over all gaps)."""
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
    """Why a request did not complete."""
    if served.submitted is None:
        return str(served.error)
    failed = next(r for r in served.submitted.requests if r.finish_reason not in ENDS)
    return str(failed.stop_reason or failed.finish_reason)
