"""What several commands share: options of the engine, KEY=VALUE settings, adapters, consoles."""

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
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
BASE = "base"  # stands for no adapter wherever an adapter may be named

Formatter = argparse.RawDescriptionHelpFormatter


def new_parser(commands: Any, name: str, help: str, description: str) -> argparse.ArgumentParser:
    """A command's parser; its description keeps its line breaks, abbreviated options are refused."""
    return commands.add_parser(name, help=help, description=description, formatter_class=Formatter, allow_abbrev=False)


def add_model_option(parser: Any) -> None:
    """--model, of a parser or of a group of one: see `model_path`."""
    parser.add_argument(
        "--model",
        default=TINY,
        metavar="PATH",
        help=f"Hugging Face folder, or the word {TINY}: the embedded {BASE_NAME} (default)",
    )


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """--model, --config, -o, --slo, --json: see `build_engine`."""
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
        help="field of the engine config, e.g. -o max_adapters=64 -o slo.tpot_ms=50; may be repeated",
    )
    group.add_argument("--slo", metavar="PRESET", help="latency promise (configs/slo/) or YAML file")
    group.add_argument("--json", action="store_true", help="results as JSON on stdout, nothing else there")


def add_adapter_option(parser: argparse.ArgumentParser, help: str) -> None:
    """--adapter NAME=PATH, repeatable."""
    parser.add_argument("--adapter", action="append", default=[], type=adapter_argument, metavar="NAME=PATH", help=help)


def adapter_argument(text: str) -> tuple[str, Path | None]:
    """NAME=PATH as (name, path); the word "base" as ("base", None)."""
    name, equals, path = text.partition("=")
    if text == BASE:
        return BASE, None
    if not (equals and name and path) or name == BASE:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=PATH of a PEFT folder, or {BASE}")
    return name, Path(path)


def settings(pairs: Iterable[str], option: str) -> dict[str, Any]:
    """{"a": 1} from ["a=1"]; values are YAML, and 1e-3 is a number (YAML 1.1 says a string).

    Raises:
        ConfigError: a pair that is not of that form.
    """
    found = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"{option}: got {pair!r}, expected KEY=VALUE")
        found[key] = parse_value(text, f"{option} {key}")
    return found


def model_path(model: str) -> Path:
    """The folder that --model means.

    Raises:
        ConfigError: there is no such folder.
    """
    path = base_path() if model == TINY else Path(model)
    if not path.is_dir():
        raise ConfigError(f"--model: got {model!r}, expected a Hugging Face folder or the word {TINY}")
    return path


def resolve_config(args: argparse.Namespace) -> EngineConfig:
    """The EngineConfig of --config and --slo, with what -o changes of them.

    Raises:
        ConfigError: an unknown preset or key, or a value that the config refuses.
    """
    import jax

    preset = args.config or ("cpu" if jax.default_backend() == "cpu" else "gpu")
    return engine_config(preset, args.override, args.slo)


def check_adapters(adapters: Sequence[tuple[str, Path | None]]) -> None:
    """Refuses every NAME=PATH that cannot be loaded whatever the model is.

    Raises:
        AdapterError: no PEFT folder, or one name twice.
    """
    paths: dict[str, Path] = {}
    for name, path in adapters:
        if path is None:
            continue
        if name in paths:
            raise AdapterError(f"--adapter: got {name}={path}, expected another name: {name}={paths[name]} came before")
        if not (path / "adapter_config.json").is_file():
            raise AdapterError(f"--adapter {name}: got {path}, expected a PEFT folder, with adapter_config.json in it")
        paths[name] = path


def build_engine(args: argparse.Namespace, console: Console, cfg: EngineConfig | None = None) -> "Engine":
    """Loads the model and compiles what serves; says on `console` how long it took.

    Args:
        args: With the options of `add_engine_options`, and maybe that of `add_adapter_option`: its folders are looked
            for before the model is loaded.
        console: For the progress bar; quiet when it is no terminal.
        cfg: Instead of what the options say.

    Raises:
        ConfigError, ModelError: see `Engine.from_pretrained`.
        AdapterError: see `check_adapters`.
    """
    path = model_path(args.model)
    check_adapters(getattr(args, "adapter", ()))
    start = time.perf_counter()
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
        AdapterError: a folder that cannot be loaded, or one name twice.
    """
    for name, path in adapters:
        if path is not None:
            engine.load_adapter(name, path)
    return [None if path is None else name for name, path in adapters]


def stderr_console() -> Console:
    """For all that is no result: stdout belongs to results."""
    return Console(stderr=True)


def dataclass_from(cls: type[Any], data: dict[str, Any], option: str) -> Any:
    """`from_dict` whose messages begin with the option.

    Raises:
        ConfigError: see `config.from_dict`.
    """
    return from_dict(cls, data, f"{option} ")
