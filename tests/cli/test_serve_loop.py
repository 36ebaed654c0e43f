"""`loquetier serve-loop`: every request of a workload is served, jobs train beside it, the result is vllm bench's."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from loquetier_jax.cli import main
from loquetier_jax.tiny.skills import dataset
from loquetier_jax.train.checkpoint import read_state
from tests.cli.vllm_bench import VLLM

WORKLOAD = ["-w", "num_requests=9", "-w", "rate=50", "-w", "input_len=[4,40]", "-w", "output_len=[2,9]"]


def test_adapters_a_job_and_a_promise(
    options: list[str], adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "result.json"
    data.write_text("\n".join(json.dumps(r) for r in dataset("shout", 40, 0) if len(r["prompt"]) < 40))
    named = ["--adapter", "base", "--adapter", f"a={adapter}", "--job", f"j={data}"]
    settings = ["--train", "pack_tokens=64", "per_device_train_batch_size=2", "--lora", "r=4"]
    rest = ["--slo", "relaxed", "--json", "--out", str(out), "-s", "seed=1"]
    assert main(["serve-loop", *WORKLOAD, *named, *settings, *rest, *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result.keys() >= VLLM
    assert (result["completed"], result["failed"]) == (9, 0)
    assert {n: one["completed"] for n, one in result["adapters"].items()} == {"a": 4, "base": 5}
    assert 0 <= result["slo_attainment"] <= 1
    assert result["jobs"]["j"]["steps"] >= 0
    details = json.loads(out.read_text())
    assert sum(details["output_lens"]) == result["total_output_tokens"]
    assert all(2 <= n <= 9 for n in details["output_lens"])
    assert all(len(gaps) == n - 1 for gaps, n in zip(details["itls"], details["output_lens"], strict=True))
    assert result["mean_ttft_ms"] == pytest.approx(1e3 * sum(details["ttfts"]) / 9)


def test_sigterm_saves_the_jobs(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], stop_job: Callable[[int], None]
) -> None:
    """They were lost, whatever they had learnt."""
    data, run = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text("\n".join(json.dumps(r) for r in dataset("shout", 40, 0) if len(r["prompt"]) < 40))
    settings = ["--train", "pack_tokens=64", "per_device_train_batch_size=2", f"output_dir={run}", "--lora", "r=4"]
    stop_job(signal.SIGTERM)
    assert main(["serve-loop", *WORKLOAD, "--job", f"j={data}", *settings, *options]) == 128 + signal.SIGTERM
    [saved] = (run / "checkpoints").iterdir()
    assert read_state(saved)["job"]["step"] == 1
    assert f"job j was interrupted at step 1: saved to {saved}" in capsys.readouterr().err.replace("\n", "")


def test_the_promise_and_what_missed_it_are_shown_per_adapter(
    options: list[str], adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It said "0.0% kept the promise": of what, and by whom, was not to be seen; nor that anything went on."""
    named = ["--adapter", "base", "--adapter", f"a={adapter}"]
    promise = ["-o", "slo.ttft_ms=1e6", "-o", "slo.tpot_ms=1e-3", "-o", "slo.itl_p99_ms=1e6"]
    assert main(["serve-loop", *WORKLOAD, *named, *promise, *options]) == 0
    shown = capsys.readouterr()
    assert "0.0% met the targets" in shown.out
    lines = shown.out.splitlines()
    assert lines[lines.index("target: TTFT <= 1e+06 ms, missed by 0 of 9") + 1 :][:2] == [
        "target: TPOT <= 0.001 ms, missed by 9 of 9",
        "target: p99 of ITL <= 1e+06 ms, missed by 0 of 9",
    ]
    rows = {cells[0]: cells[1:] for cells in map(str.split, lines) if len(cells) == 9}
    assert {name: rows[name][:3] for name in ("a", "base")} == {"a": ["4", "0", "0.0%"], "base": ["5", "0", "0.0%"]}
    assert "requests served 9/9" in shown.err


def test_a_trace_with_a_request_that_cannot_fit(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [{"timestamp": 0, "input_length": 5, "output_length": 3}, {"input_length": 500, "output_length": 3}]
    trace.write_text("\n".join(map(json.dumps, lines)))
    assert main(["serve-loop", "--workload", str(trace), *options]) == 0
    shown = capsys.readouterr().out
    assert "1 requests in" in shown
    assert "1 failed" in shown
    assert "TTFT" in shown
    assert "1 x prompt: got 500 tokens" in shown


def test_a_workload_of_which_nothing_fits_fails(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """It said how many had failed, not why, and ended as if all were well."""
    asked = ["-w", "num_requests=7", "-w", "rate=0", "-w", "output_len=[2,2]"]
    assert main(["serve-loop", *asked, "-w", "input_len=[900,900]", *options]) == 1
    shown = capsys.readouterr().out
    assert "7 failed\n7 x prompt: got 900 tokens" in shown
    assert main(["serve-loop", *asked, "-w", "input_len=[900,999]", *options]) == 1
    reasons = capsys.readouterr().out.split("7 failed\n")[1].splitlines()
    assert len(reasons) == 6 and reasons[-1] == "and 2 other reasons"
    assert main(["serve-loop", *asked, "-w", "input_len=[900,900]", "--json", *options]) == 1
    [(message, count)] = json.loads(capsys.readouterr().out)["failures"].items()
    assert "900 tokens" in message and count == 7
