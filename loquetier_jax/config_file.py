"""Plain data and YAML files to config dataclasses, strictly: what is not known is refused by name. Imports no jax."""

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from loquetier_jax.config import require
from loquetier_jax.errors import ConfigError, short

C = TypeVar("C")


class _Loader(yaml.SafeLoader):
    """Safe, and 1e-3 is a number: YAML 1.1, which this library reads, wants 1.0e-3."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def from_dict(cls: type[C], data: dict[str, Any], where: str = "") -> C:
    """Builds dataclass `cls` from plain data, nested dataclasses included.

    Raises:
        ConfigError: an unknown key, one that is gone (`cls.removed` says why), a missing mandatory one, or a value
            that the class refuses.
    """
    require(isinstance(data, dict), where or cls.__name__, data, "a mapping")
    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cls)}
    known = fields | getattr(cls, "borrowed", frozenset())  # arguments of other libraries, see `borrowed`
    gone = getattr(cls, "removed", {})
    for key in data:
        require(key not in gone, f"{where}{key}", data[key], f"no such key any more; {gone.get(key)}")
        require(key in known, f"{where}{key}", data[key], f"one of the keys {sorted(fields)}")
    try:
        return cls(**{k: _convert(hints.get(k), v, f"{where}{k}.") for k, v in data.items()})
    except TypeError as error:
        raise ConfigError(f"{where or cls.__name__}: {error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and not isinstance(value, hint):
        return from_dict(hint, value, where)
    if typing.get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        inner = typing.get_args(hint)[0]
        return tuple(_convert(inner, v, f"{where}{i}.") for i, v in enumerate(value))
    return value


def load_yaml(
    cls: type[C], path: str | Path, overrides: Sequence[str] = (), parts: Mapping[str, str | Path] | None = None
) -> C:
    """Reads a YAML file into dataclass `cls`.

    Args:
        cls: A dataclass.
        path: The file.
        overrides: "a.b=c" with c in YAML; they come last.
        parts: Files of nested dataclasses by their field; each takes the place of what the first file says there.

    Raises:
        ConfigError: see `from_dict` and `read_yaml`; also an override that is not of that form.
    """
    data = read_yaml(path) | {key: read_yaml(part) for key, part in (parts or {}).items()}
    for override in overrides:
        key, equals, text = override.partition("=")
        require(bool(equals and key), "override", override, "the form a.b=c")
        *parents, leaf = key.split(".")
        node = data
        for parent in parents:
            node = node.setdefault(parent, {})
            require(isinstance(node, dict), "override", override, f"no key below {parent}, which is {short(node, 60)}")
        node[leaf] = parse_value(text, f"override {key}")
    return from_dict(cls, data)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping; an empty file is an empty one.

    Raises:
        ConfigError: no such file, no YAML, or no mapping.
    """
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    require(data is None or isinstance(data, dict), str(path), data, "a mapping")
    return data or {}


def parse_value(text: str, where: str) -> Any:
    """One YAML value.

    Raises:
        ConfigError: no YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: got {text!r}, expected a YAML value") from error
