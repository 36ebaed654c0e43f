"""The scheduler is host code: it imports without a device."""

import subprocess
import sys
from pathlib import Path

from loquetier_jax import schedule


def test_scheduler_does_not_import_jax() -> None:
    modules = ", ".join(f"loquetier_jax.schedule.{file.stem}" for file in Path(schedule.__file__).parent.glob("*.py"))
    code = f"import sys, {modules}, benchmarks.scheduling.simulate; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
