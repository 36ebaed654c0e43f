"""What compiled code depends on besides the program: versions, device, machine, settings; a digest of our source."""

import functools
import hashlib
import importlib.util
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

PACKAGES = ("loquetier_jax", "pallas_kernels")
"""Whose source decides what is traced."""

DISTRIBUTIONS = re.compile(r"(jax|nvidia|optax|ml_dtypes)[^/]*\.dist-info", re.IGNORECASE)
"""Installed wheels that trace, compile, or are called by compiled code (cuDNN, cuBLAS, ptxas)."""

VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NPROC", "TENSORFLOW_USE_CUSTOM_CONTRACTION_KERNEL")

HARMLESS = re.compile(
    "jax_(compilation_cache|persistent_cache|raise_persistent|enable_compilation_cache|explain_cache|log_|logging"
    "|debug_log|dump_|no_tracing|no_execution|transfer_guard|traceback|tracer_error|pprint)"
)
"""Settings of jax that change no program. A new one changes every key until it is listed here, which is safe."""


def environment(device: jax.Device) -> str:
    """Everything that all programs for `device` depend on in this process, as text."""
    values = {name: value for name, value in jax.config.values.items() if not HARMLESS.match(name)}
    variables = {name: os.environ.get(name) for name in VARIABLES}
    return repr((_constant(device), sorted(values.items(), key=lambda item: item[0]), variables))


def default_device() -> jax.Device:
    """Where jax puts arrays, in this thread; found without tracing."""
    return next(iter(jax.device_put(np.zeros((), np.int8)).devices()))


@functools.cache
def _constant(device: jax.Device) -> tuple[Any, ...]:
    client = device.client
    card = (device.platform, device.device_kind, device.id, client.platform_version, jax.device_count())
    return (sys.version, installed(), card, host(device.platform))


def installed() -> tuple[str, ...]:
    """Names with versions of the wheels that matter, from the folders that pip leaves beside them."""
    folders = [folder for folder in sys.path if os.path.isdir(folder)]
    return tuple(sorted({name for folder in folders for name in os.listdir(folder) if DISTRIBUTIONS.fullmatch(name)}))


def host(kind: str) -> tuple[str, ...]:
    """The machine: for a CPU its instructions and number of threads, for a GPU its driver.

    Code that XLA compiled for another CPU may crash the process, or give other bits.
    """
    if kind != "cpu":
        return (platform.machine(), _text("/proc/driver/nvidia/version"))
    lines = {line for line in _text("/proc/cpuinfo").splitlines() if re.match(r"(flags|Features|model name)\s*:", line)}
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (platform.machine(), platform.processor(), str(threads), *sorted(lines))


@functools.cache
def code() -> str:
    """A digest of the source of PACKAGES, read once per process."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for folder in importlib.util.find_spec(package).submodule_search_locations:
            for file in sorted(Path(folder).rglob("*.py")):
                digest.update(f"{package}/{file.relative_to(folder)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:  # another operating system, or no such driver
        return ""
