"""How long an engine takes until it is ready to serve: a first start, and a second one.

    python -m benchmarks.serving.start            # on a GPU, Llama-3.1-8B shapes; writes results/<device>/start.json
    python -m benchmarks.serving.start --tiny     # the same on a CPU with a tiny model and the cpu preset

Each start is a process of its own, and is timed from before that process is started: imports, the device, weights drawn
at random on the device (they are not read from a disk), then the engine. All share one new cache folder. In the second
start tracing is forbidden once the weights are drawn: it fails where anything is traced.

Cases: start/cold, start/warm. Metrics: `s` until ready, and its parts `import_s`, `weights_s`, `engine_s`; `token_s`,
from ready to the first token of a request; `host_gb`, the most memory of the process on the host.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.results import record, write

UNITS = {"host_gb": "GB"}
BOUND = {"cold": 60.0, "warm": 20.0}  # seconds until ready, on an H100


def start(tiny: bool, preset: str, cache: Path, begun: float, forbid_tracing: bool) -> dict[str, float]:
    """One start in this process: seconds by metric.

    Args:
        tiny: The tiny model instead of Llama-3.1-8B's shapes.
        preset: Of configs/engine/, or a file.
        cache: Its compilation cache folder.
        begun: `time.time()` before the process was started.
        forbid_tracing: Whether tracing raises once the weights are drawn.
    """
    import jax
    import jax.numpy as jnp

    from benchmarks.unified import smoke
    from loquetier_jax import Engine, SamplingParams
    from loquetier_jax.models.load import init_random
    from loquetier_jax.presets import engine_config, overridden
    from loquetier_jax.runtime.warmup import enable_compilation_cache

    jax.devices()
    imported = time.time()
    enable_compilation_cache(str(cache))  # drawing weights is no part of anybody's start
    cfg = overridden(engine_config(preset), {"compilation_cache_dir": str(cache)})
    spec = smoke.tiny() if tiny else smoke.llama_8b()
    params = jax.block_until_ready(init_random(spec, jax.random.key(0), jnp.dtype(cfg.dtype)))
    drawn = time.time()
    if forbid_tracing:
        jax.config.update("jax_no_tracing", True)
    engine = Engine(spec, params, cfg)
    ready = time.time()
    engine.generate([[1, 2, 3]], params=SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    answered = time.time()
    engine.close()
    return {
        "s": ready - begun,
        "import_s": imported - begun,
        "weights_s": drawn - imported,
        "engine_s": ready - drawn,
        "token_s": answered - ready,
        "host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def started(args: argparse.Namespace, cache: Path, *options: str) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.serving.start", "--preset", args.preset, "--cache", str(cache)]
    command += ["--tiny"] if args.tiny else []
    done = subprocess.run(
        [*command, *options, "--begun", repr(time.time())], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Records of all cases."""
    found = {"cold": started(args, folder), "warm": started(args, folder, "--forbid-tracing")}
    records = []
    for case, values in found.items():
        for metric, value in values.items():
            extra = {"bound": BOUND[case]} if metric == "s" and not args.tiny else {}
            records.append(record(f"start/{case}", metric, value, UNITS.get(metric, "s"), **extra))
    return records


def main() -> None:
    """Runs the cases, or, with --begun, one start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and the cpu preset")
    parser.add_argument("--preset", help="engine preset or YAML file; default: gpu, or cpu with --tiny")
    parser.add_argument("--out", type=Path, help="instead of benchmarks/results")
    for hidden, kind in (("--cache", Path), ("--begun", float)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--forbid-tracing", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.preset = args.preset or ("cpu" if args.tiny else "gpu")
    if args.begun is not None:
        print(json.dumps(start(args.tiny, args.preset, args.cache, args.begun, args.forbid_tracing)))
        return
    with tempfile.TemporaryDirectory() as folder:
        records = measure(args, Path(folder))
    for r in records:
        print(f"{r['case']:20} {r['metric']:10} {r['value']:8.2f} {r['unit']}")
    config = {"shapes": "tiny" if args.tiny else "Llama-3.1-8B, random weights", "preset": args.preset}
    print(write("start", config, records, folder=args.out))


if __name__ == "__main__":
    main()
