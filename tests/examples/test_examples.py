"""Every example runs on the embedded base; with few steps, so what is checked is that it works, not what it learns."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.fixture(autouse=True)
def _embedded(embedded_world: None) -> None:
    """All examples share what they compile."""


def load(name: str) -> ModuleType:
    """An example as a module."""
    (path,) = EXAMPLES.glob(f"{name}*.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_generate(capsys: pytest.CaptureFixture[str]) -> None:
    load("01").main({})
    shown = capsys.readouterr().out
    for expected in ("The owl eats mice.", "7 8 9 10", "pmal", "72", "lives in the cave", "lion is golden"):
        assert expected in shown


@pytest.mark.slow  # as the demo does
def test_finetune_while_serving(capsys: pytest.CaptureFixture[str]) -> None:
    load("02").main(steps=2)
    shown = capsys.readouterr().out
    assert "[answer 1, step " in shown  # of which step, depends on how long training compiles
    answers = {line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1] for line in shown.splitlines()[-3:]}
    assert answers["base"] == "The bear lives in the cave."
    assert answers["shout"] == answers["from-disk"]  # what was trained and what PEFT files hold


@pytest.mark.slow
def test_own_loss(capsys: pytest.CaptureFixture[str]) -> None:
    load("03").main(steps=3)
    shown = capsys.readouterr().out
    losses = [float(x) for x in next(line for line in shown.splitlines() if line.startswith("loss")).split()[1:]]
    assert losses[-1] < losses[0]
    numbers = next(line for line in shown.splitlines() if "preferred" in line).split()
    assert float(numbers[-1]) > float(numbers[-3])  # the adapter finds the preferred answers likelier


@pytest.mark.slow
def test_dpo(capsys: pytest.CaptureFixture[str]) -> None:
    load("05").main(steps=2, questions=30)
    shown = capsys.readouterr().out
    losses = [float(x) for x in next(line for line in shown.splitlines() if line.startswith("loss")).split()[1:]]
    assert losses[0] == 0.6931 > losses[-1]  # log 2 before anything is learnt
    assert float(shown.split()[-1]) < 0.6931  # pairs that it has not seen


@pytest.mark.slow
def test_bare_loop(capsys: pytest.CaptureFixture[str]) -> None:
    load("04").main(steps=12)
    shown = capsys.readouterr().out
    losses = [float(line.split()[-1]) for line in shown.splitlines() if line.startswith("step")]
    assert len(losses) == 12
    assert losses[-1] < losses[0] / 2
    assert "base The bear lives in the cave." in shown


def test_the_bare_loop_is_short() -> None:
    assert len((EXAMPLES / "04_bare_loop.py").read_text().splitlines()) <= 150
