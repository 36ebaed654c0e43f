"""`loquetier finetune`: the folder it writes, the adapter in it, and going on after a kill."""

import json
import shutil
import signal
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from loquetier_jax.adapters.peft import read_peft
from loquetier_jax.cli import main
from loquetier_jax.cli.finetune import _report
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.tiny.skills import dataset
from loquetier_jax.train.metrics import read_metrics

SETTINGS = ["--lora", "r=4", "target_modules=all-linear", "--train", "max_steps=4", "save_steps=2",
            "per_device_train_batch_size=2", "learning_rate=1e-2", "max_length=60"]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pirate.jsonl"
    short = [row for row in dataset("pirate", 80, 0) if len(row["prompt"]) < 40]
    path.write_text("\n".join(map(json.dumps, short)))
    return path


@pytest.fixture(scope="module")
def run_folder(data: Path, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "pirate"
    evaluated = ["--eval-data", str(data)]
    assert main(["finetune", str(data), "--output-dir", str(folder), *SETTINGS, *evaluated, *options]) == 0
    return folder


def test_the_folder_holds_everything(run_folder: Path, data: Path, model: Path) -> None:
    config = json.loads((run_folder / "config.json").read_text())
    assert (config["data"], config["name"], config["model"]) == (str(data), "pirate", str(model))
    assert (config["lora"]["r"], config["train"]["learning_rate"], config["train"]["pack_tokens"]) == (4, 1e-2, 64)
    assert config["engine"]["max_num_seqs"] == 4
    lines = read_metrics(run_folder / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert any("eval_loss" in line for line in lines)
    assert len(list((run_folder / "checkpoints").iterdir())) == 2
    read_peft(run_folder / "adapter", DecoderSpec.from_hf(model))


def test_a_run_is_not_overwritten(
    run_folder: Path, data: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", str(data), "--output-dir", str(run_folder), *options]) == 2
    assert "which holds a run" in capsys.readouterr().err


def test_resumed_after_a_kill_the_next_losses_are_the_same(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = run_folder / "metrics.jsonl"
    before = read_metrics(metrics)
    # As if it had been killed in the last step: the newest checkpoint is the one of step 2.
    shutil.rmtree(max((run_folder / "checkpoints").iterdir()))
    shutil.rmtree(run_folder / "adapter")
    assert main(["finetune", "--output-dir", str(run_folder), "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 4
    after = read_metrics(metrics)
    assert [{**line, "time": 0} for line in after] == [{**line, "time": 0} for line in before]
    assert (run_folder / "adapter" / "adapter_config.json").is_file()


@pytest.mark.slow
def test_sigterm_saves_and_a_run_that_has_saved_nothing_starts_again(
    data: Path, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], stop_job: Callable[[int], None]
) -> None:
    """It saved nothing: --resume found no checkpoint, and without --resume the folder held a run."""
    folder = tmp_path / "run"
    command = ["finetune", "--output-dir", str(folder)]
    stop_job(signal.SIGTERM)
    assert main([*command, str(data), *SETTINGS, "save_steps=100", *options]) == 128 + signal.SIGTERM
    assert "interrupted at step 1: " in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    lines = [{**line, "time": 0} for line in read_metrics(folder / "metrics.jsonl")]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    shutil.rmtree(folder / "checkpoints")  # as if killed before the first one
    assert main([*command, "--resume"]) == 0
    assert f"{folder}: holds no checkpoint yet: the run starts from step 0" in capsys.readouterr().err.replace("\n", "")
    assert [{**line, "time": 0} for line in read_metrics(folder / "metrics.jsonl")] == lines


def test_a_finished_run_goes_on(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was refused: neither could its length be set again, nor anything else."""
    command = ["finetune", "--output-dir", str(run_folder), "--resume", "--json"]
    assert main([*command, "--train", "seed=3"]) == 2
    assert "train seed: got 3, expected one of ('max_steps'" in capsys.readouterr().err
    assert main([*command, "--train", "max_steps=5"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 5
    assert [line["step"] for line in read_metrics(run_folder / "metrics.jsonl") if "loss" in line] == [1, 2, 3, 4, 5]
    assert json.loads((run_folder / "config.json").read_text())["train"]["max_steps"] == 5
    shutil.rmtree(max((run_folder / "checkpoints").iterdir()))  # as if killed before: the newest one says max_steps=4
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    lines = read_metrics(run_folder / "metrics.jsonl")
    evals = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert (result["steps"], sorted(evals)) == (5, [4, 5]), "it had been forgotten"
    assert (result["best_step"], result["best_eval_loss"]) == min(evals.items(), key=lambda item: item[1])


def test_the_last_words_pair_the_best_adapter_with_its_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"step": n, "eval_loss": loss} for n, loss in ((1, 3.0), (2, 2.5), (3, 8.5))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cases = {True: "eval loss 2.500, adapter of step 2, the best, in", False: "eval loss 8.500, adapter in"}
    for best, said in cases.items():
        _report(Namespace(json=False), SimpleNamespace(name="a", step=3, best_step=2, serves_best=best), tmp_path)
        assert said in capsys.readouterr().out


def test_a_config_that_is_no_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    assert main(["finetune", "--output-dir", str(tmp_path), "--resume"]) == 2
    assert "expected a folder that finetune wrote" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("load_best_model_at_end=true", "load_best_model_at_end: got True, expected False without eval_data"),
        ("eval_steps=2", "eval_steps: got 2, expected 0 without eval_data"),
        ("max_length=100000", "max_length: got 100000, expected null or an integer in"),
    ],
)
def test_settings_are_refused_before_a_model_is_loaded(
    data: Path, engine_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, said: str
) -> None:
    rest = ["--train", setting, "--model", str(tmp_path / "none"), "--config", str(engine_yaml)]
    finetune = ["finetune", str(data), "--output-dir", str(tmp_path / "out")]
    for command in (finetune, ["serve-loop", "--job", f"j={data}"]):
        assert main([*command, *rest]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.slow
def test_recipe_and_command_line(
    data: Path,
    options: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = tmp_path / "recipe.yaml"
    train = "{max_steps: 1, max_length: 45, optim: adamw_torch, per_device_train_batch_size: 2, save_steps: 0}"
    recipe.write_text(f"data: {data}\nname: fish\nlora: {{r: 2}}\ntrain: {train}\n")
    folder = tmp_path / "out"
    arguments = ["finetune", "--recipe", str(recipe), "--lora", "r=3", "--output-dir", str(folder), "--json"]
    arguments += ["--truncation", "left"]
    assert main([*arguments, *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["name"], result["steps"], result["adapter"]) == ("fish", 1, str(folder / "adapter"))
    assert np.isfinite(result["loss"])
    assert result["num_truncated"] > 0 and f"{result['num_truncated']} of" in caplog.text
    assert "tokens and truncated on the left" in caplog.text
    assert read_metrics(folder / "metrics.jsonl")[0]["num_truncated"] == result["num_truncated"]
    assert json.loads((folder / "config.json").read_text())["lora"]["r"] == 3
    recipe.write_text(f"data: {data}\nepochs: 3\n")
    assert main(["finetune", "--recipe", str(recipe), "--output-dir", str(tmp_path / "new")]) == 2
    assert "epochs" in capsys.readouterr().err


def test_a_malformed_line_is_named_before_anything_is_written(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = tmp_path / "bad.jsonl", tmp_path / "out"
    path.write_text('{"text": "fine"}\n{"prompt": "no completion"}\n')
    assert main(["finetune", str(path), "--output-dir", str(folder), *options]) == 2
    assert "bad.jsonl:2: completion is missing" in capsys.readouterr().err
    assert not folder.exists()
