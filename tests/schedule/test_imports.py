"""The scheduler is host code: it imports without a device."""

import subprocess
import sys


def test_scheduler_does_not_import_jax() -> None:
    names = (
        "admission",
        "choose",
        "fairness",
        "inference",
        "latency",
        "lattice",
        "policy",
        "prefill",
        "progress",
        "simulate",
        "simulated",
    )
    names += ("slack", "snapshot", "table", "trace", "training")
    modules = ", ".join("loquetier_jax.schedule." + name for name in names)
    code = f"import sys, {modules}; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
