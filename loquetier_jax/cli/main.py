"""The entry point: parses arguments, runs a command, and maps errors to exit codes."""

import argparse
import gc
import os
import sys
from collections.abc import Sequence

from loquetier_jax import __version__
from loquetier_jax.cli import bench, demo, export, finetune, generate, serve_loop
from loquetier_jax.errors import LoquetierError

COMMANDS = (demo, generate, finetune, export, serve_loop, bench)

USAGE = 2  # exit code for a refused input, like argparse's
INTERRUPTED = 130

EPILOG = """\
start here:
  loquetier demo                                        two adapters learn while four requests stream
  loquetier generate --chat "What does the owl eat?"    the embedded base answers
  loquetier COMMAND --help                              all options of a command
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser = argparse.ArgumentParser(
        prog="loquetier",
        description="Train and serve many LoRA adapters at once on one frozen base model.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"loquetier_jax {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.add_parser(commands).set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program name; None uses the process's own.

    Returns:
        The exit code: 0; 1 if a replay completed none of its requests; 2 for a refused input (explained in one line on
        stderr); 130 after Ctrl-C; 143 after a SIGTERM on which finetune or serve-loop saved its jobs.

    Raises:
        SystemExit: from argparse, for --help (0) and unknown options (2).
    """
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("loquetier: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # e.g. `loquetier ... | head`: not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (LoquetierError, OSError) as error:  # OSError: an unreadable or unwritable file
        print(f"loquetier: error: {error}", file=sys.stderr)
        return USAGE
    finally:
        if argv is None:  # the process ends: its last collection would walk every object for nothing
            gc.freeze()
