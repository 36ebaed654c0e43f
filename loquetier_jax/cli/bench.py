"""`loquetier bench`: lists and runs the benchmarks of a checkout."""

import argparse
import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import loquetier_jax
from loquetier_jax.cli.options import new_parser
from loquetier_jax.errors import ConfigError

DESCRIPTION = """\
Lists the benchmarks of this checkout, or runs one (`python -m benchmarks.NAME`); what follows the name is for it.
Results go to benchmarks/results/<device>/.

  loquetier bench
  loquetier bench unified.smoke --help"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command."""
    parser = new_parser(commands, "bench", "list and run the benchmarks of a checkout", DESCRIPTION)
    parser.add_argument("name", nargs="?", help="a benchmark, as listed without arguments")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="for the benchmark")
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the command; the exit code is the benchmark's."""
    root = checkout()
    known = benchmarks(root)
    if args.name is None:
        width = max(map(len, known), default=0)
        for name, purpose in known.items():
            sys.stdout.write(f"{name:{width}}  {purpose}\n")
        return 0
    if args.name not in known:
        raise ConfigError(f"bench: got {args.name!r}, expected one of {sorted(known)}")
    command = [sys.executable, "-m", f"benchmarks.{args.name}", *args.arguments]
    return subprocess.run(command, cwd=root, check=False).returncode


def checkout() -> Path:
    """The folder that holds benchmarks/: this checkout, or where the command was started.

    Raises:
        ConfigError: neither has one; an installed wheel carries no benchmarks.
    """
    for root in (Path(loquetier_jax.__file__).parent.parent, Path.cwd()):
        if (root / "benchmarks" / "__init__.py").is_file():
            return root
    raise ConfigError("bench: got no benchmarks/ here, expected a checkout of the repository (wheels carry none)")


def benchmarks(root: Path) -> dict[str, str]:
    """Module below `benchmarks` -> first line of its docstring, for every file that can be run; imports nothing."""
    found = {}
    for path in sorted((root / "benchmarks").rglob("*.py")):
        text = path.read_text()
        if '__name__ == "__main__"' in text:
            name = ".".join(path.relative_to(root / "benchmarks").with_suffix("").parts)
            found[name] = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return found
