"""Compiles and measures the serving buckets ahead of time; training buckets compile in the background."""

import functools
import logging
import os
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any

import jax
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from loquetier_jax.adapters.pages import write_counts
from loquetier_jax.adapters.staging import stager
from loquetier_jax.config import Bucket, EngineConfig
from loquetier_jax.executables import NOWHERE, Executables, cache_folder
from loquetier_jax.runtime.measure import Measurer
from loquetier_jax.runtime.parallel import run_in_parallel
from loquetier_jax.sampling_params import LEVELS
from loquetier_jax.schedule.latency import LatencyModel
from loquetier_jax.step.compiled import StepFunctions
from loquetier_jax.step.state import DeviceState
from pallas_kernels.common import cpu_bits

log = logging.getLogger(__name__)


def enable_compilation_cache(folder: str | None) -> None:
    """Enables jax's compilation cache, for what is not in the store of executables beside it.

    Args:
        folder: Cache folder; "" leaves jax's setting alone, None is ~/.cache/loquetier_jax/xla.
    """
    if folder == "":
        return
    path = cache_folder(folder)
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", os.fspath(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def tell_of_broken_bits(executables: Executables = NOWHERE) -> None:
    """Warns once per process if rows are not bit-identical across batches (see `pallas_kernels.common.cpu_bits`)."""
    if not cpu_bits.rows_keep_their_bits(executables.get):
        warn_of_broken_bits()


@functools.cache
def warn_of_broken_bits() -> None:
    """Warns once per process."""
    log.warning(cpu_bits.BROKEN)


def serving_first(buckets: Iterable[Bucket]) -> list[Bucket]:
    """Buckets in compile order: inference only, then with score packs, then with train packs."""
    return sorted(buckets, key=lambda b: (b.packs > 0, b.score_packs > 0, b.rows))


def compile_serving(
    functions: StepFunctions,
    state: DeviceState,
    cfg: EngineConfig,
    latency: LatencyModel,
    progress: bool,
    meanwhile: Future[Any] | None = None,
) -> None:
    """Compiles and measures all samplers and all forwards without train rows; the engine can serve after that.

    Everything is compiled, or loaded, in parallel, and then measured one by one, with nothing beside it.

    Args:
        functions, state, cfg, latency: The engine's.
        progress: Whether to show a progress bar.
        meanwhile: Other work under way, to be waited for before anything is measured.

    Raises:
        Exception: that of a function that cannot be compiled, or of `meanwhile`.
    """
    buckets = [b for b in serving_first(cfg.buckets) if not b.packs]
    samplers = [(rows, level) for rows in cfg.sample_sizes for level in LEVELS]
    counts = write_counts(min(cfg.max_lora_pages, cfg.max_adapters))
    measurer = Measurer(functions, state, cfg, latency)
    jobs = [
        *(functools.partial(functions.forward, bucket) for bucket in reversed(buckets)),  # the longest ones first
        *(functools.partial(functions.sampler, *sampler) for sampler in reversed(samplers)),
        *(functools.partial(functions.page_writer, count) for count in counts),
        *(functools.partial(functions.page_unpacker, count) for count in counts),
        functions.gradient_writer,
        functions.admit,
    ]
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, disable=not progress, transient=True) as bar:
        task = bar.add_task("compiling", total=len(jobs))
        run_in_parallel(jobs, lambda: bar.advance(task))
        if meanwhile is not None:
            meanwhile.result()
        task = bar.add_task("measuring", total=1 + len(samplers) + len(buckets))
        stage = stager(functions.spec, functions.page_unpacker)
        state.warm_page_writes(functions.page_writer, functions.gradient_writer(), stage, cfg.max_lora_pages)
        for rows, level in samplers:
            measurer.sampler(rows, level)
            bar.advance(task)
        measurer.attention(buckets)
        bar.advance(task)
        for bucket in buckets:
            bar.update(task, description=f"measuring {bucket.name}")
            measurer.forward(bucket)
            bar.advance(task)
