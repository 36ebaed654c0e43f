"""Compiles and measures the serving buckets ahead of time; training buckets compile in the background."""

import functools
import logging
import os
from collections.abc import Iterable
from pathlib import Path

import jax
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from loquetier_jax.adapters.staging import stager
from loquetier_jax.config import Bucket, EngineConfig
from loquetier_jax.runtime.measure import Measurer
from loquetier_jax.sampling_params import LEVELS
from loquetier_jax.schedule.latency import LatencyModel
from loquetier_jax.step.compiled import StepFunctions
from loquetier_jax.step.state import DeviceState
from pallas_kernels.common import cpu_bits

log = logging.getLogger(__name__)


def enable_compilation_cache(folder: str | None) -> None:
    """Enables the persistent XLA cache, so that a second start compiles nothing.

    Args:
        folder: Cache folder; "" leaves jax's setting alone, None is ~/.cache/loquetier_jax/xla.
    """
    if folder == "":
        return
    path = Path(folder) if folder else Path.home() / ".cache" / "loquetier_jax" / "xla"
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", os.fspath(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@functools.cache
def tell_of_broken_bits() -> None:
    """Warns once per process if rows are not bit-identical across batches (see `pallas_kernels.common.cpu_bits`)."""
    if not cpu_bits.rows_keep_their_bits():
        log.warning(cpu_bits.BROKEN)


def serving_first(buckets: Iterable[Bucket]) -> list[Bucket]:
    """Buckets in compile order: inference only, then with score packs, then with train packs."""
    return sorted(buckets, key=lambda b: (b.packs > 0, b.score_packs > 0, b.rows))


def compile_serving(
    functions: StepFunctions, state: DeviceState, cfg: EngineConfig, latency: LatencyModel, progress: bool
) -> None:
    """Compiles and measures all samplers and all forwards without train rows; the engine can serve after that."""
    buckets = [b for b in serving_first(cfg.buckets) if not b.packs]
    measurer = Measurer(functions, state, cfg, latency)
    sizes = cfg.sample_sizes
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, disable=not progress, transient=True) as bar:
        task = bar.add_task("compiling", total=1 + len(buckets) + len(sizes))
        functions.admit()
        stage = stager(functions.spec, functions.page_unpacker)
        state.warm_page_writes(functions.page_writer, functions.gradient_writer(), stage, cfg.max_lora_pages)
        bar.advance(task)
        for bucket in buckets:
            bar.update(task, description=f"compiling {bucket.name}")
            functions.forward(bucket)
            bar.advance(task)
        for rows in sizes:
            bar.update(task, description=f"compiling samplers of {rows} rows")
            for level in LEVELS:
                measurer.sampler(rows, level)
            bar.advance(task)
        bar.update(task, description="measuring")
        measurer.attention(buckets)
        for bucket in buckets:
            measurer.forward(bucket)
