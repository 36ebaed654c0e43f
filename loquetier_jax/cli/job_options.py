"""Options shared by commands that train, and their checks before a model is loaded."""

import argparse
from dataclasses import fields, replace

from loquetier_jax.adapters.lora import LoraConfig
from loquetier_jax.config import RANK_PAGE, EngineConfig, require
from loquetier_jax.train.config import TRUNCATIONS, TrainConfig
from loquetier_jax.train.records import check_records


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """Adds --lora and --train, each KEY=VALUE ..., and --truncation, a shorthand for --train truncation=..."""
    group = parser.add_argument_group("training")
    for option, cls in (("--lora", LoraConfig), ("--train", TrainConfig)):
        names = ", ".join(f.name for f in fields(cls) if f.name not in ("loss", "output_dir"))
        group.add_argument(
            option,
            nargs="+",
            action="extend",
            default=[],
            metavar="KEY=VALUE",
            help=f"{cls.__name__}: {names}",
        )
    group.add_argument(
        "--truncation",
        dest="train",
        action="append",
        type="truncation={}".format,
        metavar="|".join(TRUNCATIONS),
        help="whether to cut, drop or refuse samples longer than max_length tokens; default: right",
    )


def check_job(cfg: EngineConfig, lora: LoraConfig, train: TrainConfig, data: str, eval_data: str | None = None) -> None:
    """Refuses jobs that would fail with any model, before one is loaded.

    Raises:
        DataError: see `records.check_records`.
        ConfigError: a rank or pack too large for the engine, a dtype that differs from the engine's, or evaluations
            without eval_data.
    """
    for path, name in ((data, "data"), (eval_data, "eval_data")):
        if path is not None:
            check_records(path, name)
    evaluates = eval_data is not None
    train.check_dtype(cfg.dtype)
    train.check_evaluation(evaluates=evaluates)
    train = replace(train, pack_tokens=train.pack_tokens or cfg.longest_pack(scored=evaluates) or train.pack_rows)
    rank, most = max(lora.r, *lora.rank_pattern.values(), 0), min(cfg.max_lora_rank, RANK_PAGE * cfg.train_pages)
    require(rank <= most, "lora r", rank, f"<= {most}, from the engine's max_lora_rank and train_pages")
    held = max((b.score_tokens for b in cfg.buckets), default=0)
    fits = not evaluates or train.pack_rows <= held
    require(fits, "train pack_tokens", train.pack_tokens, f"<= {held} with eval_data (the longest score bucket)")
