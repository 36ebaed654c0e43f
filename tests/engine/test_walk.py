"""README's walk of a request is the one that a request takes."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.engine.engines import add_random_adapter, greedy

ROOT = Path(__file__).parent.parent.parent
MOST = 25  # files that somebody has to open who follows a request

COMPILED = {"step/unified.py", "step/ops.py", "step/head.py", "step/sample.py", "models/decoder.py"}
"""Traced when a bucket is compiled; a request runs what they became."""
ASIDE = {
    "values": "adapters/lora borrowed bucket config delegate errors models/spec require sampling_params serve/output "
    "token_ids",
    "forms of a prompt, and whether it fits": "serve/fits serve/make_requests serve/prompts",
    "locks and pools": "fair_lock interrupts loop_thread pool",
    "looked up": "adapters/pages adapters/registry adapters/targets adapters/version serve/views",
    "found again": "serve/listeners serve/live serve/prefix",
    "what loads adapters": "adapters/host_copies adapters/loader",
    "weighed against": "runtime/reads schedule/buckets schedule/choose schedule/chunks schedule/deadlines "
    "schedule/fairness schedule/latency",
    "others in the same step": "schedule/training schedule/types serve/scoring train/runner",
}
"""What a request passes and does not stop at."""


def walk_in_readme() -> set[str]:
    text = (ROOT / "README.md").read_text()
    text = text[text.index("The walk of a request") : text.index("A training sample:")]
    return set(re.findall(r"`([\w/]+\.py)`", text)) - {"tests/engine/test_walk.py"}


def files_called(act: Callable[[], None]) -> set[str]:
    """Files of the runtime and the kernels in which a function was called, as README names them."""
    found: set[str] = set()

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            found.add(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        act()
    finally:
        sys.setprofile(None)
    inside = [Path(name).relative_to(ROOT) for name in found if name.startswith(str(ROOT))]
    return {str(f).removeprefix("loquetier_jax/") for f in inside if f.parts[0] in ("loquetier_jax", "pallas_kernels")}


def test_the_walk_of_a_request_is_that_of_the_readme(tiny_engine: Any) -> None:
    engine = tiny_engine
    add_random_adapter(engine, "a", 1)

    def act() -> None:
        request = engine.submit("abc", "a", greedy(1))
        while not request.finished:
            engine.step()

    called, told = files_called(act), walk_in_readme()
    aside = {f"{name}.py" for names in ASIDE.values() for name in names.split()}
    assert len(told) <= MOST
    assert all((ROOT / "loquetier_jax" / name).exists() or (ROOT / name).exists() for name in told)
    assert called - told - aside == set(), "it stops at a file that README does not name"
    assert told - called == COMPILED, "README names a file that it does not pass"
