"""One schema for every result: benchmarks/results/<device>/<name>.json, overwritten by the next run."""

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

FOLDER = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "optax", "numpy", "torch", "triton", "peft", "transformers")


def device_name() -> str:
    """Short name of the device jax runs on, a folder name: "cpu", "h200", "h100"."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return "cpu"
    match = re.search(r"[HABV]\d{2,3}", device.device_kind)
    return (match.group() if match else device.device_kind.replace(" ", "-")).lower()


def record(case: str, metric: str, value: float, unit: str, **extra: Any) -> dict[str, Any]:
    """One figure. `case` is a path such as "decode/B32/n4"; extra: bound, peer, peer_value."""
    unknown = set(extra) - {"bound", "peer", "peer_value", "note"}
    if unknown:
        raise TypeError(f"record: got unexpected fields {sorted(unknown)}")
    return {"case": case, "metric": metric, "value": value, "unit": unit, **extra}


def write(
    name: str, config: dict[str, Any], records: list[dict[str, Any]], folder: Path | None = None
) -> Path:
    """Writes a result file and returns its path.

    Args:
        name: The benchmark; the file's stem.
        config: What was run.
        records: See `record`.
        folder: Instead of benchmarks/results.
    """
    out = (folder or FOLDER) / device_name() / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "name": name,
        "device": jax.devices()[0].device_kind,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | versions(),
        "command": " ".join(["python", "-m", _module(), *_arguments(folder)]),
        "config": config,
        "records": records,
    }
    out.write_text(json.dumps(result, indent=1) + "\n")
    return out


def _arguments(folder: Path | None) -> list[str]:
    """What the command was given, without the option that only says where the result goes."""
    given = sys.argv[1:]
    if folder is None or str(folder) not in given:
        return given
    at = given.index(str(folder))
    return given[: at - 1] + given[at + 1 :]


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).stem


def versions() -> dict[str, str]:
    """Of the packages that figures depend on, where they are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """What LOQUETIER_COMMIT says, because git describes the folder a copy lies in; without it, what git says."""
    if named := os.environ.get("LOQUETIER_COMMIT"):
        return named
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
