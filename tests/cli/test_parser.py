"""What is refused before anything is loaded, and how: exit code 2, one line, no traceback."""

import importlib.util
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loquetier_jax import __version__
from loquetier_jax.cli import main
from loquetier_jax.cli.options import settings
from loquetier_jax.errors import ConfigError

NO_MODEL = ("--model", str(Path(__file__).parent))  # a folder that holds none: whoever loads it says so
DATA = str(Path(__file__).parents[2] / "examples" / "polite.jsonl")
COMMANDS = ("demo", "generate", "finetune", "export", "serve-loop", "bench")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_there(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*filter(None, [command]), "--help"])
    assert ended.value.code == 0
    assert f"usage: loquetier {command}".strip() in capsys.readouterr().out


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"loquetier_jax {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["generate", "x", "--unknown"],
        ["generate", "x", "--temp", "1"],  # an abbreviation
        ["generate", "x", "--max-tokens", "many"],
        ["generate", "x", "--adapter", "no-path"],
        ["generate", "x", "--adapter", "base=somewhere"],
        ["finetune", "data.jsonl"],  # no --output-dir
        ["export", "adapter"],  # no --output-dir
        ["demo", "--steps", "0"],
    ],
)
def test_wrong_options_end_with_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage:")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["generate", "x", "--model", "nowhere"], "--model: got 'nowhere'"),
        (["generate", "x", "--config", "nothing"], "engine: got 'nothing'"),
        (["generate", "x", "-o", "max_adaptors=3"], "max_adaptors"),
        (["generate", "x", "-o", "max_adapters"], "override"),
        (["generate", "x", "--slo", "eternal"], "slo: got 'eternal'"),
        (["generate", "x", "-s", "top_q=1"], "top_q: unknown"),
        (["generate", "x", "-s", "top_p=2"], "top_p: got 2"),
        (["generate", "x", "--file", "y"], "--file: got prompts as arguments as well"),
        (["generate", "--file", "no-such-file"], "no-such-file"),
        (["finetune", "--output-dir", "new"], "data: got None"),
        (["finetune", "d", "--output-dir", "new", "--lora", "rank=3"], "lora rank"),
        (["finetune", "d", "--output-dir", "new", "--train", "steps=3"], "train steps"),
        (["finetune", "d", "--output-dir", "new", "--train", "output_dir=x"], "output_dir"),
        (["finetune", "--output-dir", "new", "--resume"], "expected a folder that finetune wrote"),
        (["finetune", "d", "--output-dir", "new", "--resume"], "it unset with --resume"),
        (["finetune", "nothing.jsonl", "--output-dir", "new", *NO_MODEL], "nothing.jsonl: no such file"),
        (["finetune", DATA, "--eval-data", "nothing", "--output-dir", "new", *NO_MODEL], "nothing: no such file"),
        (["finetune", DATA, "--output-dir", DATA, *NO_MODEL], "--output-dir: got"),
        (["finetune", DATA, "--output-dir", "new", "--lora", "r=99999", *NO_MODEL], "lora r: got 99999, expected <="),
        (["finetune", DATA, "--output-dir", "new", "--lora", "bias=all", *NO_MODEL], "bias: got 'all', expected"),
        (["finetune", DATA, "--output-dir", "new", "--truncation", "up", *NO_MODEL], "truncation: got 'up'"),
        (["finetune", DATA, "--output-dir", "new", "--train", "max_length=99999999", *NO_MODEL], "max_length: got"),
        (["finetune", DATA, "--eval-data", DATA, "--output-dir", "new", "--train", "pack_tokens=1048576", *NO_MODEL],
         "train pack_tokens: got 1048576"),
        (["generate", "x", "--adapter", "a=nowhere", *NO_MODEL], "--adapter a: got nowhere, expected a PEFT folder"),
        (["generate", "x", "--max-tokens", "99999999", *NO_MODEL], "max_tokens: got 99999999"),
        (["generate", "x", "-s", "use_beam_search=true"], "use_beam_search: got True, expected False: beam search"),
        (["serve-loop", "--job", "a=nothing.jsonl", *NO_MODEL], "nothing.jsonl: no such file"),
        (["serve-loop", "--job", f"a={DATA}", "--lora", "rank=3", *NO_MODEL], "--lora rank"),
        (["serve-loop", "--adapter", "a=nowhere", *NO_MODEL], "--adapter a: got nowhere"),
        (["export", "a", "--output-dir", "new", "--model", "nowhere"], "--model: got 'nowhere'"),
        (["export", "no-adapter", "--output-dir", "new"], "no-adapter/adapter_config.json: no such file"),
        (["serve-loop", "--workload", "tsunami"], "workloads: got 'tsunami'"),
        (["serve-loop", "-w", "speed=3"], "workload speed"),
        (["serve-loop", "-w", "rate=-1"], "rate: got -1"),
        (["serve-loop", "--job", "math"], "--job: got 'math'"),
        (["serve-loop", "--job", "a=x", "--job", "b=y", "--job", "a=z"], "got 'a=z', but a=x was given before"),
        (["serve-loop", "-w", "seed=-1"], "seed: got -1"),
        (["serve-loop", "-w", "input_len=5"], "input_len: got 5"),
        (["serve-loop", "-w", "time_scale=.inf"], "time_scale: got inf"),
        (["serve-loop", "-s", "top_q=1"], "top_q: unknown"),
        (["serve-loop", "--out", "/"], "--out: got '/'"),
        (["demo", "--out", "/dev/null/x"], "/dev/null/x"),
        (["bench", "none.such"], "bench: got 'none.such'"),
    ],
)  # fmt: skip
def test_a_refused_value_is_one_line(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("loquetier: error: ")
    assert named in shown.err
    assert shown.err.count("\n") == 1


def test_settings_are_yaml_and_take_exponents() -> None:
    given = ["a=1", "b=2e-3", "c=[1, 2]", "d=all-linear", "e=true", "f=a=b", "g=null"]
    expected = {"a": 1, "b": 2e-3, "c": [1, 2], "d": "all-linear", "e": True, "f": "a=b", "g": None}
    assert settings(given, "--train") == expected
    for wrong in ("a", "=1"):
        with pytest.raises(ConfigError, match="KEY=VALUE"):
            settings([wrong], "--train")
    with pytest.raises(ConfigError, match="expected a YAML value"):
        settings(["a=[1"], "--train")


def test_bench_lists_without_importing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 0
    assert "unified.smoke" in capsys.readouterr().out


def test_help_imports_no_jax() -> None:
    code = "import sys, loquetier_jax.cli; sys.exit(1 if 'jax' in sys.modules else 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_says_that_there_is_no_torch() -> None:
    """transformers does, at its import, and everything else that it says is to be heard."""
    source = Path(importlib.util.find_spec("transformers").origin).read_text()
    said = re.search(r'warning_advice\(\s*"(PyTorch was not found[^"]*)"', source)[1]
    logger = logging.getLogger("transformers")
    record = lambda text: logger.makeRecord(logger.name, logging.WARNING, "", 0, text, (), None)  # noqa: E731
    assert not logger.filter(record(said)) and logger.filter(record("Something else"))
