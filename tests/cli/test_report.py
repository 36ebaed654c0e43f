"""The figures of a replay, against numbers worked out by hand."""

from types import SimpleNamespace

import pytest

from loquetier_jax.cli.replay import Served
from loquetier_jax.cli.report import summarize
from loquetier_jax.cli.workload import Arrival
from loquetier_jax.config import SLOConfig
from loquetier_jax.serve.output import RequestMetrics
from tests.cli.vllm_bench import VLLM


def served(name: str, due: float, times: list[float], adapter: str = "base", reason: str = "length") -> Served:
    metrics = RequestMetrics(due, token_times=times, finished_time=times[-1])
    request = SimpleNamespace(
        metrics=metrics, finish_reason=reason, prompt_ids=(1, 2, 3), output_ids=[0] * len(times), stop_reason="boom"
    )
    arrival = Arrival(at=due, input_length=3, output_length=len(times), adapter=adapter)
    return Served(arrival, due, SimpleNamespace(request_id=name, requests=[request]))


def test_figures() -> None:
    runs = [served("a", 0.0, [0.1, 0.2, 0.4]), served("b", 1.0, [1.3, 1.4], "x")]
    runs[1].submitted.requests[0].metrics.num_cached_tokens = 2
    found = summarize(runs, 2.0, SLOConfig())
    assert found.keys() >= VLLM
    assert (found["completed"], found["failed"]) == (2, 0)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (6, 5)
    assert found["total_cached_tokens"] == 2
    assert (found["request_throughput"], found["output_throughput"]) == (1.0, 2.5)
    assert found["mean_ttft_ms"] == pytest.approx(200)
    assert found["median_tpot_ms"] == pytest.approx((150 + 100) / 2)
    assert found["mean_itl_ms"] == pytest.approx(400 / 3)
    assert found["mean_e2el_ms"] == pytest.approx(400)
    assert found["std_ttft_ms"] == pytest.approx(100)
    assert "slo_attainment" not in found
    assert found["adapters"]["x"]["mean_ttft_ms"] == pytest.approx(300)


def test_a_promise_is_kept_by_requests_whose_ttft_and_tpot_keep_it() -> None:
    runs = [
        served("a", 0.0, [0.1, 0.2]),
        served("late", 0.0, [0.6, 0.7]),
        served("slow", 0.0, [0.1, 0.9]),
        served("one token", 0.0, [0.1]),
        Served(Arrival(at=0, input_length=1, output_length=1, adapter="base"), 0.0, None, "refused"),
    ]
    found = summarize(runs, 2.0, SLOConfig(ttft_ms=500, tpot_ms=200))
    assert found["slo_attainment"] == pytest.approx(2 / 5)
    assert found["request_goodput"] == pytest.approx(1.0)
    assert found["failed"] == 1
    assert found["slo"] == {"ttft_ms": 500, "tpot_ms": 200}
    assert found["slo_missed"] == {"ttft_ms": 1, "tpot_ms": 1}
    assert found["adapters"]["base"]["slo_attainment"] == pytest.approx(2 / 5)


def test_gaps_are_promised_by_themselves_and_an_adapter_by_itself() -> None:
    """A mean can be met in bursts; and one tenant's misses must not hide among another's thousands."""
    bursts = served("bursts", 0.0, [0.1, *(0.1 + 0.3 * (1 + i // 5) for i in range(20))])
    even = [served(f"{i}", 0.0, [0.1 + 0.1 * k for k in range(21)], "x") for i in range(3)]
    slow = served("slow", 0.0, [0.1, 0.5, 0.9], "x")
    found = summarize([bursts, *even, slow], 5.0, SLOConfig(tpot_ms=150, itl_p99_ms=200))
    assert found["slo_missed"] == {"tpot_ms": 1, "itl_p99_ms": 2}
    assert found["slo_attainment"] == pytest.approx(3 / 5)
    assert {name: one["slo_attainment"] for name, one in found["adapters"].items()} == {"base": 0.0, "x": 0.75}


def test_an_adapter_whose_requests_all_failed_has_its_row() -> None:
    runs = [served("a", 0.0, [0.1, 0.2]), served("b", 0.0, [0.1], "x", reason="error")]
    found = summarize(runs, 1.0, SLOConfig())["adapters"]
    assert (found["x"]["completed"], found["x"]["failed"], found["x"]["p99_ttft_ms"]) == (0, 1, None)
    assert "slo_attainment" not in found["x"]


def test_details_and_failures() -> None:
    runs = [served("a", 0.0, [0.1, 0.2]), served("b", 0.0, [0.1], reason="error")]
    found = summarize(runs, 1.0, SLOConfig(), details=True)
    assert (found["completed"], found["failed"]) == (1, 1)
    assert found["output_lens"] == [2, 1]
    assert found["ttfts"] == [0.1, 0.1]
    assert found["itls"][0] == pytest.approx([0.1])
    assert found["errors"] == ["", "boom"]


def test_failures_are_counted_by_their_reason() -> None:
    arrival = Arrival(at=0, input_length=1, output_length=1, adapter="base")
    refused = [Served(arrival, 0.0, None, "too long") for _ in range(3)]
    aborted = served("c", 0.0, [0.1], reason="abort")
    aborted.submitted.requests[0].stop_reason = None
    second = served("d", 0.0, [0.1])  # one of two completions is enough
    second.submitted.requests += served("d", 0.0, [0.1], reason="error").submitted.requests
    runs = [served("a", 0.0, [0.1]), aborted, second, *refused]
    found = summarize(runs, 1.0, SLOConfig(), details=True)
    assert list(found["failures"].items()) == [("too long", 3), ("abort", 1), ("boom", 1)]
    assert found["errors"] == ["", "abort", "boom", "too long", "too long", "too long"]


def test_nothing_was_served() -> None:
    found = summarize([], 1.0, SLOConfig(ttft_ms=1))
    assert found["mean_ttft_ms"] is None
    assert found["slo_attainment"] is None
