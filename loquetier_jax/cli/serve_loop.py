"""`loquetier serve-loop`: replays a workload over several adapters while jobs train, and reports latencies."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loquetier_jax.adapters.lora import LoraConfig
from loquetier_jax.cli.generate import sampling_params
from loquetier_jax.cli.job_bar import JobBar
from loquetier_jax.cli.job_options import add_job_options, check_job
from loquetier_jax.cli.options import (
    BASE,
    add_adapter_option,
    add_engine_options,
    build_engine,
    dataclass_from,
    load_adapters,
    new_parser,
    resolve_config,
    settings,
    stderr_console,
)
from loquetier_jax.cli.outcome import show
from loquetier_jax.cli.replay import Served, replay
from loquetier_jax.cli.report import summarize
from loquetier_jax.cli.workload import Workload, arrivals
from loquetier_jax.config import require
from loquetier_jax.config_file import read_yaml
from loquetier_jax.errors import ConfigError
from loquetier_jax.interrupts import interruptible
from loquetier_jax.presets import preset_path
from loquetier_jax.train.config import TrainConfig
from loquetier_jax.train.run_folder import CHECKPOINTS

if TYPE_CHECKING:
    from loquetier_jax.engine import Engine
    from loquetier_jax.train.manager import JobHandle

DESCRIPTION = """\
Replays a workload in real time through the compiled serving loop and reports TTFT, TPOT, ITL, throughput and, with
latency targets, how many requests met them and which targets the others missed. Results use the names of
`vllm bench serve`. Failed requests are counted by reason; the exit code is 1 if no request was completed.

  loquetier serve-loop --workload poisson -w rate=8
  loquetier serve-loop --workload trace.jsonl --adapter a=peft/a --adapter b=peft/b --slo interactive
  loquetier serve-loop --workload burst --job math=gsm8k.jsonl --train max_steps=1000 --out result.json

A workload is a preset of configs/workloads/, a YAML file with the same keys, a .jsonl trace ({"timestamp" in ms,
"input_length", "output_length"}, Mooncake's format; or "prompt" or "messages" instead of the input length), or a file
with one arrival time in seconds per line. Requests without an adapter are assigned one
(-w assign=round-robin|uniform|zipf)."""

REFRESH_S = 0.2


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command."""
    parser = new_parser(commands, "serve-loop", "replay a workload while jobs train, and measure", DESCRIPTION)
    parser.add_argument("--workload", default="poisson", metavar="PRESET|FILE", help="default: poisson")
    parser.add_argument(
        "-w",
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="field of the workload: rate, burstiness, num_requests, input_len, output_len, assign, zipf, "
        "time_scale, seed; e.g. -w rate=8 -w input_len=[32,64]",
    )
    add_adapter_option(parser, f"PEFT folder to load and serve; may be repeated; {BASE} is the base (default)")
    parser.add_argument(
        "-s", "--sampling", action="append", default=[], metavar="KEY=VALUE", help="field of SamplingParams"
    )
    parser.add_argument(
        "--job", action="append", default=[], metavar="NAME=DATA", help="fine-tune at the same time; may be repeated"
    )
    add_job_options(parser)
    parser.add_argument("--out", metavar="FILE", help="write the result, with every request's times, as JSON")
    add_engine_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    console = stderr_console()
    workload = read_workload(args.workload, args.set)
    names = [name for name, _ in args.adapter] or [BASE]
    asked = arrivals(workload, names)
    sampling = {"temperature": 0.0} | settings(args.sampling, "--sampling")
    sampling_params(sampling, "--sampling ")  # refuse bad values now rather than per request
    if args.out:  # likewise, rather than after the measurement
        require(not Path(args.out).is_dir(), "--out", args.out, "a file")
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    lora, train = settings(args.lora, "--lora"), settings(args.train, "--train")
    jobs = _jobs(args.job)
    for data in jobs.values():
        configs = dataclass_from(LoraConfig, lora, "--lora"), dataclass_from(TrainConfig, train, "--train")
        check_job(resolve_config(args), *configs, data)
    engine = build_engine(args, console)
    load_adapters(engine, args.adapter)
    handles = [_start_job(engine, name, data, lora, train) for name, data in jobs.items()]
    with JobBar(console) as bar, interruptible() as interrupted:
        _until_they_step(engine, handles, bar, interrupted)
        result = measure(engine, asked, handles, sampling, workload.seed, bar, interrupted, details=bool(args.out))
    if interrupted:
        for job in handles:
            console.print(_saved(job), highlight=False)
        return 128 + interrupted[0]
    result = {"workload": args.workload, "model": args.model} | result
    if args.out:
        Path(args.out).write_text(json.dumps(result) + "\n")
    if args.json:
        keys = ("input_lens", "output_lens", "ttfts", "itls", "errors")  # per-request lists, only in --out
        print(json.dumps({key: value for key, value in result.items() if key not in keys}))
    else:
        show(result)
    return 1 if result["failed"] and not result["completed"] else 0


def read_workload(name: str, overrides: list[str]) -> Workload:
    """The workload given by --workload and -w.

    Raises:
        ConfigError: neither a preset nor a file, an unknown key, or a value that is refused.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or not path.is_file():
        data = read_yaml(preset_path("workloads", name))
    else:
        data = {"source": name}
    return Workload.from_dict(data | settings(overrides, "-w"))


def _jobs(texts: list[str]) -> dict[str, str]:
    """{name: data} from the --job options."""
    jobs: dict[str, str] = {}
    for text in texts:
        name, equals, data = text.partition("=")
        if not (equals and name and data):
            raise ConfigError(f"--job: got {text!r}, expected NAME=DATA")
        if name in jobs:
            raise ConfigError(f"--job: got {text!r}, but {name}={jobs[name]} was given before")
        jobs[name] = data
    return jobs


def _start_job(engine: "Engine", name: str, data: str, lora: dict[str, Any], train: dict[str, Any]) -> "JobHandle":
    """Starts a job that by default outlasts the replay."""
    return engine.finetune(
        name,
        data,
        lora=dataclass_from(LoraConfig, lora, "--lora"),
        train=dataclass_from(TrainConfig, {"num_train_epochs": 1000.0} | train, "--train"),
    )


def _saved(job: "JobHandle") -> str:
    """Saves a job after an interrupt, if it has an output_dir; returns a message about it."""
    if job.status not in ("queued", "running"):
        return f"job {job.name} is {job.status}"
    if job.output_dir is None:
        return f"job {job.name} was interrupted at step {job.step} and not saved: it has no output_dir"
    return f"job {job.name} was interrupted at step {job.step}: saved to {job.checkpoint(job.output_dir / CHECKPOINTS)}"


def _until_they_step(engine: "Engine", handles: list["JobHandle"], bar: JobBar, interrupted: list[int]) -> None:
    """Waits until every job has made a step, so that nothing compiles during the replay, or for an interrupt."""

    def stepped() -> bool:
        for job in handles:
            bar.update(job)
        return bool(interrupted) or all(job.step > 0 or job.status not in ("queued", "running") for job in handles)

    engine.wait(stepped)


def measure(
    engine: "Engine",
    asked: list[Any],
    handles: list["JobHandle"],
    sampling: dict[str, Any],
    seed: int,
    bar: JobBar,
    interrupted: list[int],
    details: bool = False,
) -> dict[str, Any]:
    """Replays the requests while the jobs train, then cancels jobs still running.

    Returns:
        The result; {} after an interrupt, which leaves the jobs running.
    """
    before = {job.name: (job.step, _tokens(job)) for job in handles}
    start = shown = engine.loop.clock()

    def on_step(served: list[Served]) -> None:
        nonlocal shown
        for job in handles:
            bar.update(job)
        if (now := engine.loop.clock()) > shown + REFRESH_S:  # too expensive to do at every step
            shown = now
            bar.show("requests served", *_progress(served, len(asked), now - start))

    served = replay(engine, asked, sampling=sampling, seed=seed, on_step=on_step, stopped=lambda: bool(interrupted))
    if interrupted:
        return {}
    duration = engine.loop.clock() - start
    bar.show("requests served", *_progress(served, len(asked), duration))
    result = summarize(served, duration, engine.cfg.slo, details=details)
    result["jobs"] = {job.name: _of_job(job, *before[job.name], duration) for job in handles}
    for job in handles:
        if job.status in ("queued", "running"):
            job.cancel()
    engine.drain()
    return result


def _progress(served: list[Served], total: int, seconds: float) -> tuple[int, int, str]:
    """(requests that have ended, total requests, status text)."""
    ended = sum(one.submitted is None or one.submitted.finished for one in served)
    tokens = sum(len(r.output_ids) for one in served if one.submitted for r in one.submitted.requests)
    return ended, total, f"{len(served) - ended} under way  {tokens / max(seconds, 1e-9):,.0f} tok/s"


def _tokens(job: "JobHandle") -> int:
    return next((line["num_tokens"] for line in reversed(job.metrics) if "num_tokens" in line), 0)


def _of_job(job: "JobHandle", step: int, tokens: int, duration: float) -> dict[str, Any]:
    losses = [line["loss"] for line in job.metrics if "loss" in line]
    return {
        "status": job.status,
        "steps": job.step - step,
        "train_tokens": _tokens(job) - tokens,
        "train_throughput": (_tokens(job) - tokens) / duration,
        "loss": losses[-1] if losses else None,
    }
