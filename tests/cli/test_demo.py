"""`loquetier demo` in small: everything it promises is there; what it learns takes more steps than these."""

import json
from pathlib import Path

import pytest

from loquetier_jax.cli import main
from loquetier_jax.cli.scenario import QUESTIONS, SKILLS


@pytest.mark.slow
def test_demo(
    tmp_path: Path,
    embedded_world: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["demo", "--steps", "2", "--out", str(tmp_path), "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["before"]["base"] == ["The lion is golden.", "The bear lives in the cave.", "Hugo is a pilot."]
    assert found["before"].keys() == found["after"].keys() == {"base", *SKILLS}
    assert all(answers == found["before"]["base"] for answers in found["before"].values())
    assert found["after"]["base"] == found["before"]["base"]
    assert found["questions"] == list(QUESTIONS)
    assert len(found["versions"]) >= 2  # before and after a publish
    for skill in SKILLS:
        assert len(found["jobs"][skill]["loss"]) == 2
        assert (tmp_path / skill / "adapter_config.json").is_file()
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "tok/s served" in shown.err
