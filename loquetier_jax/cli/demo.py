"""`loquetier demo`: trains two adapters on the embedded base while four requests stream."""

import argparse
import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from loquetier_jax.cli.options import new_parser
from loquetier_jax.cli.scenario import SKILLS, Scenario
from loquetier_jax.cli.screen import Screen, report

DESCRIPTION = """\
Uses a frozen base of 3.9 million parameters that comes with the package. Two LoRA adapters learn to answer in two
styles; meanwhile four requests stream through the same steps: one on the base alone, one on each adapter, and one
that asks one adapter the same question over and over as new versions are published.

Writes demo.png (loss, tokens per second and latency over time) and both adapters, as PEFT folders."""

STEPS, LEARNING_RATE = 48, 5e-3


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command."""
    parser = new_parser(commands, "demo", "two adapters learn while four requests stream", DESCRIPTION)
    parser.add_argument("--out", default="demo", metavar="DIR", help="default: demo/")
    parser.add_argument("--steps", type=_positive, default=STEPS, metavar="N", help=f"default: {STEPS}")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, metavar="LR")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of data, initialization and order")
    parser.add_argument("--json", action="store_true", help="print only the results, as JSON, on stdout")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected an integer >= 1")
    return value


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)  # fail now rather than minutes later
    console = Console(stderr=args.json)
    console.print("[bold]loquetier demo[/]: one frozen base, two adapters in training, four requests streaming")
    scenario = play(console, args.steps, args.learning_rate, args.seed)
    scenario.save(out)
    picture = draw(scenario, out / "demo.png")
    if args.json:
        print(json.dumps(scenario.as_json() | {"picture": str(picture)}))
        return 0
    console.print()
    report(scenario, console)
    first = SKILLS[0]
    written = ", ".join(str(out / skill) for skill in SKILLS)
    console.print(f"\nwritten: {picture}, adapters {written}", highlight=False, soft_wrap=True)
    console.print(
        f'next:    loquetier generate --chat "What does the cow eat?" --adapter base --adapter {first}={out / first}',
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    return 0


def play(console: Console, steps: int, learning_rate: float, seed: int) -> Scenario:
    """Builds the engine and runs the scenario on it."""
    start = time.perf_counter()
    with console.status("loading the base and compiling what serves it") if console.is_terminal else nullcontext():
        from loquetier_jax.engine import Engine  # late: jax and transformers take seconds to import
        from loquetier_jax.schedule.policy import PolicyConfig
        from loquetier_jax.timeline import Timeline
        from loquetier_jax.tiny import base_path

        engine = Engine.from_pretrained(
            base_path(), config="demo", policy=PolicyConfig(train_share=0.8), progress=False
        )
    console.print(f"[dim]tiny-llama-bytes ready in {time.perf_counter() - start:.1f} s[/]", highlight=False)
    scenario = Scenario(engine, steps, learning_rate, seed, Timeline(engine.loop.clock))
    scenario.start()
    with Screen(console) as screen:
        scenario.run(screen.show)
    return scenario


def draw(scenario: Scenario, path: Path) -> Path:
    """Saves the plot."""
    from loquetier_jax.plots import save_timeline

    return save_timeline(
        scenario.timeline,
        path,
        "One base: two adapters in training, four requests streaming, in the same steps",
    )
