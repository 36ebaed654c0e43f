"""Options shared by several commands: engine, KEY=VALUE settings, adapters, consoles."""

import argparse
import gc
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from loquetier_jax.config import EngineConfig
from loquetier_jax.config_file import from_dict, parse_value
from loquetier_jax.errors import AdapterError, ConfigError
from loquetier_jax.presets import engine_config
from loquetier_jax.tiny import BASE_NAME, base_path

if TYPE_CHECKING:
    from loquetier_jax.engine import Engine

TINY = "tiny"
BASE = "base"  # the reserved adapter name that means no adapter

Formatter = argparse.RawDescriptionHelpFormatter


def new_parser(commands: Any, name: str, help: str, description: str) -> argparse.ArgumentParser:
    """A parser for a command; the description keeps its line breaks, and abbreviated options are refused."""
    return commands.add_parser(name, help=help, description=description, formatter_class=Formatter, allow_abbrev=False)


def add_model_option(parser: Any) -> None:
    """Adds --model to a parser or argument group; see `model_path`."""
    parser.add_argument(
        "--model",
        default=TINY,
        metavar="PATH",
        help=f"Hugging Face folder, or {TINY} for the embedded {BASE_NAME} (default)",
    )


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Adds --model, --config, -o, --slo and --json; see `build_engine`."""
    group = parser.add_argument_group("engine")
    add_model_option(group)
    group.add_argument(
        "--config",
        metavar="PRESET",
        help="engine preset (configs/engine/) or YAML file; default: cpu or gpu, by device",
    )
    group.add_argument(
        "-o",
        "--override",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a field of the engine config, e.g. -o max_adapters=64 -o slo.tpot_ms=50; may be repeated",
    )
    group.add_argument("--slo", metavar="PRESET", help="latency targets: a preset (configs/slo/) or YAML file")
    group.add_argument("--json", action="store_true", help="print only the results, as JSON, on stdout")


def add_adapter_option(parser: argparse.ArgumentParser, help: str) -> None:
    """Adds --adapter NAME=PATH, repeatable."""
    parser.add_argument("--adapter", action="append", default=[], type=adapter_argument, metavar="NAME=PATH", help=help)


def adapter_argument(text: str) -> tuple[str, Path | None]:
    """Parses NAME=PATH to (name, path), and "base" to ("base", None)."""
    name, equals, path = text.partition("=")
    if text == BASE:
        return BASE, None
    if not (equals and name and path) or name == BASE:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=PATH of a PEFT folder, or {BASE}")
    return name, Path(path)


def settings(pairs: Iterable[str], option: str) -> dict[str, Any]:
    """{"a": 1} from ["a=1"]; values are YAML, except that 1e-3 is a number (in YAML 1.1 it is a string).

    Raises:
        ConfigError: a pair not of the form KEY=VALUE.
    """
    found = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"{option}: got {pair!r}, expected KEY=VALUE")
        found[key] = parse_value(text, f"{option} {key}")
    return found


def model_path(model: str) -> Path:
    """The folder that --model refers to.

    Raises:
        ConfigError: there is no such folder.
    """
    path = base_path() if model == TINY else Path(model)
    if not path.is_dir():
        raise ConfigError(f"--model: got {model!r}, expected a Hugging Face folder or {TINY}")
    return path


def resolve_config(args: argparse.Namespace) -> EngineConfig:
    """The EngineConfig from --config and --slo, with the overrides of -o.

    Raises:
        ConfigError: an unknown preset or key, or a value that the config refuses.
    """
    import jax

    preset = args.config or ("cpu" if jax.default_backend() == "cpu" else "gpu")
    return engine_config(preset, args.override, args.slo)


def check_adapters(adapters: Sequence[tuple[str, Path | None]]) -> None:
    """Refuses adapters that cannot be loaded with any model.

    Raises:
        AdapterError: not a PEFT folder, or a name given twice.
    """
    paths: dict[str, Path] = {}
    for name, path in adapters:
        if path is None:
            continue
        if name in paths:
            raise AdapterError(f"--adapter: got {name}={path}, but {name}={paths[name]} was given before")
        if not (path / "adapter_config.json").is_file():
            raise AdapterError(f"--adapter {name}: got {path}, expected a PEFT folder with adapter_config.json")
        paths[name] = path


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection inside: an import makes little, and hundreds of thousands of objects to walk each time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def build_engine(args: argparse.Namespace, console: Console, cfg: EngineConfig | None = None) -> "Engine":
    """Loads the model and compiles the serving buckets; prints the time it took on `console`.

    Args:
        args: With the options of `add_engine_options` and optionally `add_adapter_option`, whose folders are checked
            before the model is loaded.
        console: Where to print.
        cfg: Replaces the config given by the options.

    Raises:
        ConfigError, ModelError: see `Engine.from_pretrained`.
        AdapterError: see `check_adapters`.
    """
    path = model_path(args.model)
    check_adapters(getattr(args, "adapter", ()))
    start = time.perf_counter()
    with uncollected():
        from loquetier_jax.engine import Engine  # late: jax and transformers take seconds to import

    fixed = {}
    if cfg is None:
        cfg = resolve_config(args)
        keys = {pair.partition("=")[0] for pair in args.override}
        fixed = {"max_model_len": cfg.max_model_len} if "max_model_len" in keys else {}
    engine = Engine.from_pretrained(path, config=cfg, progress=sys.stdout.isatty() and not args.json, **fixed)
    name = BASE_NAME if args.model == TINY else path.name
    console.print(f"[dim]{name} ready in {time.perf_counter() - start:.1f} s[/]", highlight=False)
    return engine


def load_adapters(engine: "Engine", adapters: Sequence[tuple[str, Path | None]]) -> list[str | None]:
    """Loads every NAME=PATH; returns the names in order, None for "base".

    Raises:
        AdapterError: a folder that cannot be loaded, or a name given twice.
    """
    for name, path in adapters:
        if path is not None:
            engine.load_adapter(name, path)
    return [None if path is None else name for name, path in adapters]


def stderr_console() -> Console:
    """A console on stderr, because stdout is reserved for results."""
    return Console(stderr=True)


def dataclass_from(cls: type[Any], data: dict[str, Any], option: str) -> Any:
    """`from_dict` with error messages that start with the option.

    Raises:
        ConfigError: see `config_file.from_dict`.
    """
    return from_dict(cls, data, f"{option} ")
