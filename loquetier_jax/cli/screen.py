"""Shows a running Scenario: a live layout on a terminal, otherwise a line every few seconds."""

import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from loquetier_jax.cli.options import BASE

if TYPE_CHECKING:
    from loquetier_jax.cli.scenario import Scenario

REFRESH_S = 0.2
PLAIN_EVERY_S = 5.0
RATE_WINDOW_S = 3.0


class Screen:
    """Shows a scenario; use it as a context manager and call `show` as often as you like.

    Args:
        console: Output console.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._next = 0.0
        self._heard = 0

    def __enter__(self) -> "Screen":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, scenario: "Scenario") -> None:
        """Draws the current state, at a limited rate."""
        self._say_new_versions(scenario)
        now = time.perf_counter()
        if now < self._next:
            return
        if self._live is not None:
            self._next = now + REFRESH_S
            self._live.update(layout(scenario), refresh=True)
        else:
            self._next = now + PLAIN_EVERY_S
            self._console.print(f"{scenario.timeline.now:5.1f} s  {_line(scenario)}", highlight=False, soft_wrap=True)

    def _say_new_versions(self, scenario: "Scenario") -> None:
        """Without a terminal, prints each version's first answer."""
        versions = scenario.versions()
        for version, text in versions[self._heard :] if self._live is None else ():
            lane = scenario.lanes[-1]
            said = Text(f"         {lane.adapter} v{version}: {text}")
            self._console.print(said, soft_wrap=True)
        self._heard = len(versions)


def _line(scenario: "Scenario") -> str:
    jobs = [f"{name} {job.step}/{job.total_steps} {_loss(scenario, name)}" for name, job in scenario.jobs.items()]
    return "  ".join([*jobs, _rates(scenario)])


def _loss(scenario: "Scenario", name: str) -> str:
    points = scenario.timeline.losses.get(name)
    return f"loss {points[-1][1]:.2f}" if points else "compiling"


def _rates(scenario: "Scenario") -> str:
    timeline = scenario.timeline
    trained, served = timeline.training_rate(RATE_WINDOW_S), timeline.output_rate(RATE_WINDOW_S)
    return f"{trained:,.0f} tok/s trained, {served:,.0f} tok/s served"


def layout(scenario: "Scenario") -> Group:
    """The layout: two bars, four streams, one line of rates."""
    bars = Table.grid(padding=(0, 2), expand=True)
    for width in (10, None, 12, 12):
        bars.add_column(width=width, ratio=None if width else 1, no_wrap=True)
    for name, job in scenario.jobs.items():
        bar = ProgressBar(total=job.total_steps, completed=job.step)
        bars.add_row(f"[bold]{name}[/]", bar, f"{job.step}/{job.total_steps}", _loss(scenario, name))
    streams = Table.grid(padding=(0, 2), expand=True)
    streams.add_column(ratio=2, no_wrap=True)
    streams.add_column(ratio=3, no_wrap=True)
    streams.add_column(ratio=5, no_wrap=True)
    for lane in scenario.lanes:
        version = "" if lane.version is None else f" v{lane.version}"
        title = Text(f"{lane.adapter or BASE}{version}", style="bold")
        streams.add_row(title, Text(lane.question, style="dim"), Text(lane.text.strip()))
    return Group(
        Panel(bars, title="training", title_align="left", border_style="blue"),
        Panel(streams, title="serving, in the same steps", title_align="left", border_style="green"),
        Text(f"{scenario.timeline.now:5.1f} s   {_rates(scenario)}", style="dim"),
    )


def report(scenario: "Scenario", console: Console) -> None:
    """Prints the effect of the adapters: for every question, the answers before and after training."""
    from loquetier_jax.cli.scenario import QUESTIONS, SKILLS

    for i, question in enumerate(QUESTIONS):
        table = Table(title=question, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for column in ("answered by", "before training", "after training"):
            table.add_column(column, header_style="dim", overflow="fold")
        for name in (BASE, *SKILLS):
            table.add_row(name, Text(scenario.before[name][i]), Text(scenario.after[name][i]))
        console.print(table)
        console.print()
    console.print(Text(f"{QUESTIONS[0]} ({scenario.lanes[-1].adapter}, version by version)", style="bold"))
    table = Table(box=None, pad_edge=False, show_header=False)
    for version, text in scenario.versions():
        table.add_row(f"v{version}", Text(text))
    console.print(table)
