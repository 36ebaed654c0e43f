"""`loquetier export`: writes an adapter as a plain PEFT folder, or merged into its base as a standalone model."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from loquetier_jax.cli.options import add_model_option, model_path, new_parser

DESCRIPTION = """\
Writes an adapter for use with other libraries. Starts no engine and uses no GPU.

  loquetier export runs/sql/adapter --merged --output-dir sql-model --model PATH   a Hugging Face model: base + adapter
  loquetier export someones-adapter --output-dir plain --model PATH                a PEFT folder with plain names"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command."""
    parser = new_parser(commands, "export", "write an adapter as a PEFT folder or merged into its base", DESCRIPTION)
    parser.add_argument("adapter", help="PEFT folder")
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--merged", action="store_true", help="write a whole model, which loads without PEFT")
    add_model_option(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    base = model_path(args.model)
    from loquetier_jax.adapters.merge import write_merged  # late: they import jax
    from loquetier_jax.adapters.peft import read_peft, write_peft
    from loquetier_jax.models.load import open_hf

    spec, _ = open_hf(base)
    config, shape, weights = read_peft(args.adapter, spec)
    folder = Path(args.output_dir)
    if args.merged:
        write_merged(folder, base, weights, shape)
    else:
        write_peft(folder, weights, shape, spec, config=config, base_model_name_or_path=str(base))
    if args.json:
        print(json.dumps({"output_dir": str(folder), "merged": args.merged}))
    else:
        sys.stdout.write(f"{'model' if args.merged else 'adapter'} in {folder}\n")
    return 0
