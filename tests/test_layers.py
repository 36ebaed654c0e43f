"""The house: arrows between packages run one way, files are short, nobody reaches through a private name."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("loquetier_jax", "pallas_kernels")
BELOW = {
    "loquetier_jax.schedule": {"config", "config_file", "errors"},
    "loquetier_jax.batch": {"config", "errors", "sampling_params", "pallas_kernels"},
    "loquetier_jax.step": {
        *{"adapters", "batch", "config", "errors", "executables", "models", "sampling_params"},
        "pallas_kernels",
    },
    "loquetier_jax.models": {"config", "errors", "executables", "pallas_kernels"},
    "loquetier_jax.executables": set(),
    "pallas_kernels": set(),
}
"""Packages that may import nothing but these."""


def modules() -> dict[str, Path]:
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}
    return {name: file for name, file in names.items() if name != "loquetier_jax"}  # it resolves names on first use


def imported(name: str, file: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules that a module imports, wherever it does, under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [one if one in known else node.module for one in found]
        else:
            continue
        yield from (one for one in found if one in known and one != name)


def package_of(name: str) -> str:
    top, *rest = name.split(".")
    return f"{top}.{rest[0]}" if top == "loquetier_jax" else top


def graphs() -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Who imports whom: modules, and packages (modules at the top count as packages of one)."""
    known = modules()
    fine = {name: set(imported(name, file, known)) for name, file in known.items()}
    coarse: dict[str, set[str]] = {}
    for name, others in fine.items():
        mine = coarse.setdefault(package_of(name), set())
        mine.update({package_of(other) for other in others} - {package_of(name)})
    return fine, coarse


def circles(graph: dict[str, set[str]]) -> set[str]:
    """What is left once everything that imports nothing, or only what has gone, has gone."""
    left = {name: set(others) for name, others in graph.items()}
    while gone := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in gone}
    return set(left)


def test_arrows_run_one_way() -> None:
    fine, coarse = graphs()
    assert not circles(fine) and not circles(coarse)
    for package, below in BELOW.items():
        others = {other.removeprefix("loquetier_jax.") for other in coarse[package]}
        assert others <= below, package


def test_a_circle_would_be_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {"a", "b", "c"}


def test_files_are_short() -> None:
    sources = {file: 300 for package in PACKAGES for file in (ROOT / package).rglob("*.py")}
    limits = sources | dict.fromkeys((ROOT / "tests").rglob("*.py"), 400)
    too_long = {str(f): n for f, most in limits.items() if (n := len(f.read_text().splitlines())) > most}
    assert not too_long


THEIRS = {"_cache_size", "_replace", "_exit", "_grouped_mm", "_compile_jinja_template"}
"""Of jax, namedtuples, os, torch and transformers, which have no other name for it."""


def private_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of every `other._x`; those of self, cls, super() and of classes in the file are its own."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)} | {"self", "cls"}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.endswith("__"):
            continue
        of = node.value.func if isinstance(node.value, ast.Call) else node.value
        if node.attr not in THEIRS and not (isinstance(of, ast.Name) and of.id in own | {"super"}):
            yield node.lineno, node.attr


def test_nobody_reaches_through_a_private_name() -> None:
    found = []
    for folder in (*PACKAGES, "tests", "benchmarks", "examples"):
        for file in (ROOT / folder).rglob("*.py"):
            lines = private_names(ast.parse(file.read_text()))
            found += [f"{file.relative_to(ROOT)}:{line} .{name}" for line, name in lines]
    assert not found
