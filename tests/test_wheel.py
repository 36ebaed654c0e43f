"""The wheel, installed into an environment of its own, runs and finds its configs and its embedded base."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path, home: Path) -> str:
    """Standard output of a command that sees neither the checkout nor this process's settings."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "PYTHON", "XLA_", "VIRTUAL_ENV"))}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment | {"HOME": str(home)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, cache_home: Path) -> Path:
    """bin/ of an environment with the wheel; what the wheel needs is borrowed from this one (no network)."""
    folder, home = tmp_path_factory.mktemp("wheel"), cache_home
    build = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ROOT)
    run(*build, cwd=folder, home=home)
    venv.create(folder / "env", with_pip=False)
    ask = "import site; print(site.getsitepackages()[0])"
    site = Path(run(folder / "env/bin/python", "-c", ask, cwd=folder, home=home).strip())
    (wheel,) = folder.glob("*.whl")
    install = (sys.executable, "-m", "pip", "--python", folder / "env", "install", "--quiet", "--no-deps", wheel)
    run(*install, cwd=folder, home=home)
    # A path in a .pth file is no site folder: the editable install of the checkout, a .pth itself, stays unseen.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "env" / "bin"


@pytest.mark.slow
def test_the_wheel_runs_the_demo_anywhere(installed: Path, tmp_path: Path, cache_home: Path) -> None:
    home = cache_home
    ask = "import loquetier_jax; print(loquetier_jax.__file__)"
    where = run(installed / "python", "-c", ask, cwd=tmp_path, home=home)
    assert Path(where.strip()).is_relative_to(installed.parent)
    demo = (installed / "loquetier", "demo", "--steps", "2", "--out", tmp_path / "out", "--json")
    shown = run(*demo, cwd=tmp_path, home=home)
    assert json.loads(shown)["before"]["base"][0] == "The lion is golden."
    assert (tmp_path / "out" / "demo.png").is_file()
