"""`loquetier bench`: lists or runs the benchmarks of a checkout."""

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
Lists the benchmarks of this checkout, or runs one (`python -m benchmarks.NAME`), passing the remaining arguments to it.
Results go to benchmarks/results/<device>/.

  loquetier bench
  loquetier bench unified.smoke --help"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command."""
    parser = new_parser(commands, "bench", "list and run the benchmarks of a checkout", DESCRIPTION)
    parser.add_argument("name", nargs="?", help="benchmark to run; lists them if omitted")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments for the benchmark")
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
    """The folder that contains benchmarks/: this checkout, or the working directory.

    Raises:
        ConfigError: neither has one; installed wheels do not include the benchmarks.
    """
    for root in (Path(loquetier_jax.__file__).parent.parent, Path.cwd()):
        if (root / "benchmarks" / "__init__.py").is_file():
            return root
    raise ConfigError("bench: no benchmarks/ here; run it in a checkout of the repository (wheels do not include it)")


def benchmarks(root: Path) -> dict[str, str]:
    """Module under `benchmarks` -> first line of its docstring, for every runnable file; imports nothing."""
    found = {}
    for path in sorted((root / "benchmarks").rglob("*.py")):
        text = path.read_text()
        if '__name__ == "__main__"' in text:
            name = ".".join(path.relative_to(root / "benchmarks").with_suffix("").parts)
            found[name] = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return found
