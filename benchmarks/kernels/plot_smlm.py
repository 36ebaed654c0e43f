"""Draws smlm.json: every case that a peer was measured on, this kernel, the best peer and the byte floor.

    python -m benchmarks.kernels.plot_smlm benchmarks/results/h200/smlm.json    # writes smlm.png beside it
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from loquetier_jax.plots import COLORS, GREY


def rows_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The `fwd_us` records that name a peer, each with the cold figure of its case where there is one."""
    cold = {r["case"]: r["value"] for r in result["records"] if r["metric"] == "fwd_cold_us"}
    rows = [r for r in result["records"] if r["metric"] == "fwd_us" and "peer_value" in r]
    return [{**row, "cold": cold.get(row["case"])} for row in rows]


def save_plot(path: Path) -> Path:
    """Draws a result file.

    Args:
        path: An smlm.json.

    Returns:
        The picture, a .png beside it.

    Raises:
        ValueError: no record of the file names a peer.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    result = json.loads(path.read_text())
    rows = rows_of(result)
    if not rows:
        raise ValueError(f"path: got {path} without a fwd_us record that names a peer, expected at least one")
    ratios = [row["value"] / row["peer_value"] for row in rows]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    figure = Figure(figsize=(8.0, 0.36 * len(rows) + 1.5), layout="constrained")
    axes = figure.subplots()
    for y, (row, ratio) in enumerate(zip(rows, ratios, strict=True)):
        axes.plot((row["value"], row["peer_value"]), (y, y), color="#cccccc", linewidth=3, zorder=1)
        axes.annotate(f"{ratio:.2f} x", (1.0, y), xycoords=axes.get_yaxis_transform(), xytext=(6, 0),
                      textcoords="offset points", va="center", fontsize=8, color=GREY)  # fmt: skip
    places = range(len(rows))
    series = (("byte floor, all cold", "bound", "|", GREY), ("best peer", "peer_value", "o", COLORS[1]),
              ("this kernel", "value", "o", COLORS[0]))  # fmt: skip
    for label, key, marker, color in series:
        axes.plot([row[key] for row in rows], places, marker, color=color, label=label, markersize=7, zorder=2)
    cold = [(row["cold"], y) for y, row in enumerate(rows) if row["cold"]]
    if cold:
        axes.plot(*zip(*cold, strict=True), "o", color=COLORS[0], mfc="none", label="this kernel, x and y cold too")
    axes.set_xscale("log")
    ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50, 100) if t <= max(row["peer_value"] for row in rows) * 1.3]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(places, [row["case"].removeprefix("smlm/") for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("microseconds a call")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    figure.suptitle(f"LoRA shrink + expand on one {result['device']}: {mean:.2f} x the best peer (geometric mean)",
                    fontsize=11, x=0.01, ha="left")  # fmt: skip
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=110)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, nargs="?", default=Path(__file__).parents[1] / "results/h200/smlm.json")
    print(save_plot(parser.parse_args().path))


if __name__ == "__main__":
    main()
