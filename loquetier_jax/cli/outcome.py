"""Prints the results of a replay: latencies, adapters, latency targets kept and missed, failures, jobs."""

import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loquetier_jax.cli.report import LATENCIES

PROMISES = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "itl_p99_ms": "p99 of ITL"}
SHOWN_FAILURES = 5  # maximum reasons printed; the JSON has all of them


def show(result: dict[str, Any]) -> None:
    """Prints the result of `report.summarize`, and the jobs."""
    console = Console()
    _show_latencies(console, result)
    _show_adapters(console, result)
    _show_promise(result)
    for name, job in result["jobs"].items():
        sys.stdout.write(f"{name}: {job['steps']} steps, {job['train_throughput']:,.0f} training tokens/s meanwhile\n")


def _show_latencies(console: Console, result: dict[str, Any]) -> None:
    table = Table(title=f"{result['completed']} requests in {result['duration']:.1f} s")
    for column in ("ms", "mean", "median", "p90", "p99"):
        table.add_column(column, justify="left" if column == "ms" else "right")
    for name in LATENCIES:
        table.add_row(name.upper(), *(_ms(result[f"{key}_{name}_ms"]) for key in ("mean", "median", "p90", "p99")))
    console.print(table)


def _ms(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _show_adapters(console: Console, result: dict[str, Any]) -> None:
    """Prints one row per adapter, if there are several."""
    if len(result["adapters"]) < 2:
        return
    table = Table(box=box.SIMPLE)  # fits into 80 columns
    table.add_column("adapter", overflow="fold", min_width=len("adapter"))
    promise = ["met"] if "slo" in result else []
    figures = ("TTFT\nmedian", "TTFT\np99", "TPOT\nmedian", "TPOT\np99", "ITL\np99")
    for column in ("requests", "failed", *promise, *figures):
        table.add_column(column, justify="right", no_wrap=True)
    for name, one in result["adapters"].items():
        kept = [f"{100 * one['slo_attainment']:.1f}%"] if promise else []
        keys = ("median_ttft", "p99_ttft", "median_tpot", "p99_tpot", "p99_itl")
        counts = (str(one["completed"]), str(one["failed"]), *kept)
        table.add_row(Text(name), *counts, *(_ms(one[f"{key}_ms"], digits=0) for key in keys))
    console.print(table)


def _show_promise(result: dict[str, Any]) -> None:
    """Prints rates, how many requests met and missed the latency targets, and why requests failed."""
    rates = f"{result['request_throughput']:.2f} requests/s, {result['output_throughput']:,.1f} output tokens/s"
    kept = f", {100 * result['slo_attainment']:.1f}% met the targets" if "slo_attainment" in result else ""
    failed = f", {result['failed']} failed" if result["failed"] else ""
    sys.stdout.write(f"{rates}{kept}{failed}\n")
    for name, threshold in result.get("slo", {}).items():
        missed, what = result["slo_missed"][name], PROMISES[name]
        sys.stdout.write(f"target: {what} <= {threshold:g} ms, missed by {missed} of {result['completed']}\n")
    for message, count in list(result["failures"].items())[:SHOWN_FAILURES]:
        sys.stdout.write(f"{count} x {message}\n")
    if len(result["failures"]) > SHOWN_FAILURES:
        sys.stdout.write(f"and {len(result['failures']) - SHOWN_FAILURES} other reasons\n")
