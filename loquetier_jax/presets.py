"""Finds the YAML files under configs/, in a checkout or an installed wheel."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import loquetier_jax
from loquetier_jax.config import EngineConfig, require
from loquetier_jax.config_file import load_yaml
from loquetier_jax.errors import ConfigError


def configs_folder() -> Path:
    """configs/ inside the installed package, or next to it in a checkout."""
    package = Path(loquetier_jax.__file__).parent
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise ConfigError(
        f"configs: no such folder in or beside {package}; the package's presets should be there"
    )


def preset_path(kind: str, name: str) -> Path:
    """The file of a preset, or `name` itself if it is the path of an existing file.

    Raises:
        ConfigError: neither; the message lists the known presets.
    """
    if Path(name).is_file():
        return Path(name)
    folder = configs_folder() / kind
    known = sorted(p.stem for p in folder.glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"{kind}: got {name!r}, expected a YAML file or one of {known}")
    return folder / f"{name}.yaml"


def engine_config(name: str, overrides: Sequence[str] = (), slo: str | None = None) -> EngineConfig:
    """Loads an EngineConfig from configs/engine/ or a file.

    Args:
        name: A preset's name, or a path.
        overrides: "a.b=c"; applied last.
        slo: Name in configs/slo/, or a path; replaces the preset's own slo.

    Raises:
        ConfigError: an unknown preset or key, or a value that the config refuses.
    """
    parts = {} if slo is None else {"slo": preset_path("slo", slo)}
    return load_yaml(EngineConfig, preset_path("engine", name), overrides, parts)


def overridden(config: EngineConfig, overrides: Mapping[str, Any]) -> EngineConfig:
    """`config` with some fields replaced; raises ConfigError for an unknown field or a value that it refuses."""
    known = sorted(f.name for f in fields(EngineConfig))
    for key, value in overrides.items():
        require(key in known, key, value, f"one of {known}")
    return replace(config, **overrides)


def fitted(config: EngineConfig, limit: int, *, asked: bool) -> EngineConfig:
    """`config` with max_model_len capped at the model's `limit`; raises ConfigError if the user `asked` for more."""
    if config.max_model_len <= limit:
        return config
    require(not asked, "max_model_len", config.max_model_len, f"<= {limit} for this model")
    return replace(config, max_model_len=limit)
