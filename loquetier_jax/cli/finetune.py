"""`loquetier finetune`: trains a PEFT adapter from a data file and keeps everything about the run in one folder."""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loquetier_jax import __version__
from loquetier_jax.adapters.lora import LoraConfig
from loquetier_jax.cli.job_bar import JobBar
from loquetier_jax.cli.job_options import add_job_options, check_job
from loquetier_jax.cli.options import (
    TINY,
    add_engine_options,
    build_engine,
    dataclass_from,
    new_parser,
    resolve_config,
    settings,
    stderr_console,
)
from loquetier_jax.config import EngineConfig, require
from loquetier_jax.config_file import from_dict, read_yaml
from loquetier_jax.errors import CheckpointError, ConfigError, JobError
from loquetier_jax.interrupts import interruptible
from loquetier_jax.train.changes import CHANGEABLE, changed_config
from loquetier_jax.train.config import TrainConfig
from loquetier_jax.train.metrics import read_metrics
from loquetier_jax.train.records import check_records
from loquetier_jax.train.run_folder import CHECKPOINTS, METRICS, RunLock

if TYPE_CHECKING:
    from loquetier_jax.engine import Engine
    from loquetier_jax.train.manager import JobHandle

DESCRIPTION = """\
Trains one LoRA adapter and writes a folder: config.json (all settings), metrics.jsonl (one line per step),
checkpoints/, and adapter/, which PEFT, vLLM and `loquetier generate --adapter` can load.

  loquetier finetune data.jsonl --output-dir runs/sql --lora r=16 lora_alpha=32 --train max_steps=500
  loquetier finetune --recipe sql.yaml --output-dir runs/sql
  loquetier finetune --output-dir runs/sql --resume         after Ctrl-C or a kill: continues with identical losses
  loquetier finetune --output-dir runs/sql --resume --train max_steps=1000         extends a finished run

A recipe is YAML: data, eval_data, name, lora: {...}, train: {...}; options on the command line win. Data is JSON
lines or one JSON array: {"messages": [...]}, {"prompt", "completion"}, {"text"}, Alpaca, GSM8K, ShareGPT, or token
ids as {"input_ids", "labels"}; malformed lines are reported before the model is loaded. Samples longer than
max_length tokens (or one pack) are truncated on the right, counted and reported; see --truncation."""

CONFIG, ADAPTER = "config.json", "adapter"
TOLD = ("loss", "eval_loss", "num_tokens", "num_truncated", "num_dropped", "num_empty")  # metrics in the final report
SAVE_STEPS = 100  # default here, so that command-line runs can be resumed


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of a finetune run, and the keys of a --recipe file.

    Attributes:
        data, eval_data: Files of JSON lines or of one JSON array.
        name: Name of the job and the adapter.
        lora, train: As in the Python API.
    """

    data: str
    eval_data: str | None = None
    name: str = "adapter"
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command."""
    parser = new_parser(commands, "finetune", "train a LoRA adapter from a data file", DESCRIPTION)
    parser.add_argument("data", nargs="?", help="file of JSON lines or of one JSON array")
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="the run's folder")
    parser.add_argument("--name", help="name of the job and adapter; default: the name of the folder")
    parser.add_argument("--eval-data", metavar="FILE", help="held-out data, scored at the end or every eval_steps")
    parser.add_argument("--recipe", metavar="FILE", help="YAML with any of: data, eval_data, name, lora, train")
    goes_on = "continue from the newest checkpoint in --output-dir, or from step 0 if there is none"
    parser.add_argument("--resume", action="store_true", help=goes_on)
    add_job_options(parser)
    add_engine_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    console = stderr_console()
    folder = Path(args.output_dir)
    recipe, cfg, args.model = _resumed(args, folder) if args.resume else _fresh(args, folder)
    with _locked(args, folder):
        if args.resume and not _has_checkpoint(folder):
            console.print(f"{folder}: no checkpoint yet; starting from step 0", highlight=False)
            (folder / METRICS).unlink(missing_ok=True)
            recipe = replace(recipe, train=replace(recipe.train, output_dir=str(folder)))
            args.resume = False
        engine = build_engine(args, console, cfg)
        job = _begin(args, engine, recipe, cfg, folder)
        with JobBar(console) as bar:
            interrupted = _drive(engine, job, bar)
        if interrupted:
            saved = job.checkpoint(folder / CHECKPOINTS)
            console.print(f"interrupted at step {job.step}: saved to {saved}; continue with --resume", highlight=False)
            return 128 + interrupted
        job.save(folder / ADAPTER)
        _report(args, job, folder)
    return 0


def _locked(args: argparse.Namespace, folder: Path) -> RunLock:
    """Locks the run's folder and checks again that a new run does not collide with another.

    Raises:
        JobError: another process holds the lock.
        ConfigError: another process has started a run there in the meantime.
    """
    lock = RunLock(folder)
    if not args.resume:
        _check_new(folder)
    return lock


def _begin(args: argparse.Namespace, engine: "Engine", recipe: Recipe, cfg: EngineConfig, folder: Path) -> "JobHandle":
    """Starts or resumes the job; config.json is written before there is anything to resume."""
    if args.resume:
        changes = _changes(folder, recipe.train) | settings(args.train, "--train")
        job = engine.resume_job(folder, recipe.data, eval_data=recipe.eval_data, train=changes)
        _write_config(folder, recipe, cfg, args.model)
        return job
    _write_config(folder, recipe, cfg, args.model)
    return engine.finetune(recipe.name, recipe.data, lora=recipe.lora, train=recipe.train, eval_data=recipe.eval_data)


def _check_new(folder: Path) -> None:
    if (folder / METRICS).exists():
        raise ConfigError(f"--output-dir: {folder} already contains a run; use a new folder, or --resume")


def _fresh(args: argparse.Namespace, folder: Path) -> tuple[Recipe, EngineConfig, str]:
    """The settings of a new run: (recipe, engine config, model)."""
    require(folder.is_dir() or not folder.exists(), "--output-dir", args.output_dir, "a folder")
    _check_new(folder)
    cfg = resolve_config(args)
    data = read_yaml(args.recipe) if args.recipe else {}
    given = {"data": args.data, "eval_data": args.eval_data, "name": args.name}
    data |= {key: value for key, value in given.items() if value is not None}
    require("data" in data, "data", None, "a JSON-lines file, as an argument or in the recipe")
    where = args.recipe or "recipe"
    lora, train = (_mapping(data.get(key), f"{where}: {key}") for key in ("lora", "train"))
    lora |= settings(args.lora, "--lora")
    train |= settings(args.train, "--train")
    for key in ("loss", "output_dir"):
        require(key not in train, f"train {key}", train.get(key), "it unset: the command sets it")
    data["lora"] = dataclass_from(LoraConfig, lora, "lora")
    defaults = {"pack_tokens": cfg.longest_pack(scored="eval_data" in data), "save_steps": SAVE_STEPS}
    train = defaults | train | {"output_dir": str(folder)}
    data["train"] = dataclass_from(TrainConfig, train, "train")
    recipe = dataclass_from(Recipe, {"name": folder.resolve().name} | data, where)
    check_job(cfg, recipe.lora, recipe.train, recipe.data, recipe.eval_data)
    return recipe, cfg, args.model


def _mapping(value: Any, where: str) -> dict[str, Any]:
    require(value is None or isinstance(value, dict), where, value, "a mapping")
    return dict(value or {})


def _resumed(args: argparse.Namespace, folder: Path) -> tuple[Recipe, EngineConfig, str]:
    """The settings of a resumed run: those saved, except what `resume_job` allows --train to change."""
    for option in ("data", "name", "eval_data", "recipe", "lora", "config", "override", "slo"):
        given = getattr(args, option)
        require(not given, option, given, f"it unset with --resume: {folder / CONFIG} sets it")
    changes = changed_config({}, settings(args.train, "--train"))
    try:
        saved = json.loads((folder / CONFIG).read_text())
        recipe = {key: saved[key] for key in ("data", "eval_data", "name")}
        recipe |= {"lora": LoraConfig(**saved["lora"]), "train": TrainConfig.from_dict(saved["train"] | changes)}
        cfg = from_dict(EngineConfig, saved["engine"])
    except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"--resume: got {folder}, expected a folder that finetune wrote: {error}") from error
    known = args.model in (TINY, saved["model"])
    require(known, "--model", args.model, f"{saved['model']}, as in {folder / CONFIG}")
    recipe["train"].check_evaluation(evaluates=recipe["eval_data"] is not None)
    for path in filter(None, (saved["data"], saved["eval_data"])):
        check_records(path)
    return Recipe(**recipe), cfg, saved["model"]


def _has_checkpoint(folder: Path) -> bool:
    from loquetier_jax.train.checkpoint import CheckpointStore

    return bool(CheckpointStore(folder / CHECKPOINTS).committed())


def _changes(folder: Path, train: TrainConfig) -> dict[str, Any]:
    """--train changes missing from the newest checkpoint, because a resumed run was killed before writing another."""
    from loquetier_jax.train.checkpoint import find_checkpoint, read_state

    state = read_state(find_checkpoint(folder / CHECKPOINTS), whole=False)  # `resume_job` verifies the rest
    saved, now = TrainConfig.from_dict(state["job"]["config"]).to_dict(), train.to_dict()
    return {key: now[key] for key in CHANGEABLE if now[key] != saved[key]}


def _write_config(folder: Path, recipe: Recipe, cfg: EngineConfig, model: str) -> None:
    """The resolved config, next to the metrics."""
    import jax

    versions = {"loquetier_jax": __version__, "jax": jax.__version__}
    described = {
        "model": model,
        "data": recipe.data,
        "eval_data": recipe.eval_data,
        "name": recipe.name,
        "lora": asdict(recipe.lora),
        "train": recipe.train.to_dict(),
        "engine": asdict(cfg),
        "versions": versions,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n")


def _drive(engine: "Engine", job: "JobHandle", bar: JobBar) -> int:
    """Runs the job to its end and returns 0, or the number of an interrupting signal, between two iterations.

    Raises:
        JobError: the job failed.
    """
    with interruptible() as interrupted:

        def done() -> bool:
            bar.update(job)
            return bool(interrupted) or job.status not in ("queued", "running")

        engine.wait(done)
    if job.status in ("queued", "running"):
        return interrupted[0]
    job.wait()
    if job.status != "succeeded":
        raise JobError(f"job {job.name!r} was cancelled")
    return 0


def _report(args: argparse.Namespace, job: "JobHandle", folder: Path) -> None:
    """Prints where the adapter is and its final metrics."""
    lines = read_metrics(folder / METRICS)  # of the whole run; a resumed job has only its own part
    last = {key: value for line in lines for key, value in line.items()}  # the latest value of each metric
    result = {"name": job.name, "adapter": str(folder / ADAPTER), "steps": job.step}
    result |= {key: last[key] for key in TOLD if key in last}
    evals = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    if job.best_step is not None:
        result |= {"best_step": job.best_step, "best_eval_loss": evals.get(job.best_step)}
    if args.json:
        print(json.dumps(result))
        return
    losses = [line["loss"] for line in lines if "loss" in line]
    trend = f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, " if losses else ""
    served = evals.get(job.best_step if job.serves_best else job.step)
    held_out = "" if served is None else f"eval loss {served:.3f}, "
    best = f"of step {job.best_step}, the best, " if job.serves_best else ""
    sys.stdout.write(f"{job.step} steps, {trend}{held_out}adapter {best}in {folder / ADAPTER}\n")
