"""Plots of runs, with matplotlib's object interface: no display, no global state."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loquetier_jax.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # from the colorblind-safe Okabe-Ito palette
GREY = "#666666"
SIZE_INCHES, DPI = (8.0, 7.0), 100


def save_timeline(timeline: Timeline, path: str | Path, title: str) -> Path:
    """Plots a Timeline: the loss of every job, trained and served tokens per second, and gaps between tokens.

    Args:
        timeline: Of a finished run.
        path: A .png or .svg file; its folder is created if missing.
        title: Title of the figure.

    Returns:
        The path.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    loss, trained, served, gap = panels = figure.subplots(4, 1, sharex=True, height_ratios=(3, 2, 2, 3))
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    _draw_loss(loss, timeline)
    rates = timeline.rates(window_s=max(1.0, timeline.now / 80))
    _draw_rate(trained, *rates["training"], "trained\ntokens/s", COLORS[2])
    _draw_rate(served, *rates["output"], "served\ntokens/s", COLORS[3])
    for axes in (loss, trained):
        _draw_compiling(axes, timeline)
    _draw_gaps(gap, timeline)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        for t, _ in timeline.marks:
            axes.axvline(t, color=GREY, linewidth=0.8, linestyle=":")
    gap.set_xlabel("seconds since the first request")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path


def _draw_loss(axes: "Axes", timeline: Timeline) -> None:
    for (name, points), color in zip(timeline.losses.items(), COLORS, strict=False):
        if points:
            axes.plot(*np.transpose(points), color=color, linewidth=1.6, label=name)
    axes.set_ylabel("training loss")
    axes.set_ylim(bottom=0)
    if any(timeline.losses.values()):
        axes.legend(frameon=False, fontsize=9, title="adapter", title_fontsize=9)
    for t, text in timeline.marks[:1]:
        axes.annotate(
            text,
            (t, 1.0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(4, -4),
            textcoords="offset points",
            fontsize=8,
            color=GREY,
            va="top",
        )


def _draw_rate(axes: "Axes", times: np.ndarray, values: np.ndarray, label: str, color: str) -> None:
    axes.fill_between(times, values, step="mid", color=color, alpha=0.25, linewidth=0)
    axes.step(times, values, where="mid", color=color, linewidth=1.2)
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)


def _draw_compiling(axes: "Axes", timeline: Timeline) -> None:
    """Shades the time before the first training step."""
    until = timeline.training_since
    until = timeline.now if until is None else until
    axes.axvspan(0, until, color=GREY, alpha=0.08, linewidth=0)
    axes.annotate(
        "compiling",
        (until / 2, 0.5),
        xycoords=axes.get_xaxis_transform(),
        ha="center",
        va="center",
        fontsize=8,
        color=GREY,
    )


def _draw_gaps(axes: "Axes", timeline: Timeline) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    if timeline.gaps:
        times, gaps = np.transpose(timeline.gaps)
        axes.plot(times, gaps, ".", color=GREY, markersize=2, alpha=0.5)
        low, high = np.percentile(gaps, [50, 99])
        for value, name in ((low, "median"), (high, "p99")):
            axes.axhline(value, color=COLORS[3], linewidth=1.0)
            axes.annotate(
                f"{name} {value:.0f} ms",
                (0.995, value),
                xycoords=_right(axes),
                ha="right",
                va="bottom",
                fontsize=8,
            )
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(*(np.percentile(gaps, [0.5, 100]) * (0.7, 1.6)))
    axes.set_ylabel("gap between\ntokens (ms)")


def _right(axes: "Axes") -> Any:
    """Transform with x as a fraction of the axes' width and y in data units."""
    return axes.get_yaxis_transform()
