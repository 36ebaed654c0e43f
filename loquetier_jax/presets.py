"""The YAML files under configs/, found in a checkout and in an installed wheel alike."""

from collections.abc import Sequence
from pathlib import Path

import loquetier_jax
from loquetier_jax.config import EngineConfig
from loquetier_jax.config_file import load_yaml
from loquetier_jax.errors import ConfigError


def configs_folder() -> Path:
    """configs/ of the wheel, or of the checkout the package lies in."""
    package = Path(loquetier_jax.__file__).parent
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise ConfigError(
        f"configs: got no such folder in {package} or beside it, expected the presets of this package"
    )


def preset_path(kind: str, name: str) -> Path:
    """The file of a preset, or `name` itself when it is a path of an existing file.

    Raises:
        ConfigError: neither; names the presets there are.
    """
    if Path(name).is_file():
        return Path(name)
    folder = configs_folder() / kind
    known = sorted(p.stem for p in folder.glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"{kind}: got {name!r}, expected a YAML file or one of {known}")
    return folder / f"{name}.yaml"


def engine_config(name: str, overrides: Sequence[str] = (), slo: str | None = None) -> EngineConfig:
    """An EngineConfig of configs/engine/ or of a file.

    Args:
        name: Of the preset, or a path.
        overrides: "a.b=c"; they come last.
        slo: Of configs/slo/, or a path: takes the place of the preset's own slo.

    Raises:
        ConfigError: an unknown preset or key, or a value that the config refuses.
    """
    parts = {} if slo is None else {"slo": preset_path("slo", slo)}
    return load_yaml(EngineConfig, preset_path("engine", name), overrides, parts)
