"""Compiled functions shared by all engines of one shape in a process: compiling them is most of what the suite does.

Three worlds serve the tests of engines: the small random model of tests/engine/engines.py, the checkpoints of five
families (tests/engine/parity.py), and the embedded base (examples, demo). Engines of a world differ in their buckets,
in what they hold and promise, and in nothing that is compiled.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

import loquetier_jax.engine as engine_module
from loquetier_jax.config import Bucket, EngineConfig, SLOConfig
from loquetier_jax.executables import Executables
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.step.compiled import StepFunctions

ANY = (Bucket(prefill=16, chunks=1, decode=1),)

_functions: dict[tuple[DecoderSpec, EngineConfig], StepFunctions] = {}


def functions_of(spec: DecoderSpec, cfg: EngineConfig, state: Any, executables: Executables) -> StepFunctions:
    """One StepFunctions for all configs that compile the same: it is asked for buckets, and lists none."""
    host = {"slo": SLOConfig(), "max_host_adapters": None, "enable_prefix_caching": True, "seed": 0}
    shapes = replace(cfg, buckets=ANY, compilation_cache_dir="", **host)
    if (spec, shapes) not in _functions:
        _functions[spec, shapes] = StepFunctions(spec, cfg, state, executables)
    return _functions[spec, shapes]


@contextmanager
def shared_functions() -> Iterator[None]:
    """Engines made inside share what they compile with all others made so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "StepFunctions", functions_of)
        yield
