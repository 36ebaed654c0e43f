"""Makes XLA on CPU compute a row of a matrix product with the same bits, regardless of the number of rows.

Three things make the order of a row's sum depend on microarchitecture, number of threads and number of rows (measured
on Zen 3, Sapphire Rapids and Zen 5 with jaxlib 0.10.2 and 0.11.2):

- YNNPACK, into which XLA fuses dots by default, and similar libraries (XNNPACK, oneDNN), currently off by default. They
  are controlled by compiler options: `compiler_options()`.
- oneDNN's SGEMM, which Eigen uses for dots that are not fused: on AVX2 the last rows of a product take another path
  (e.g. the last two of 128). Eigen reads an environment variable before its first product; importing this module sets
  it, unless the user has.
- Eigen's threads: with about four or more, some products with about 128 rows are split along the sum. Their number is
  fixed when jax starts; NPROC=1 in the environment sets it to one. Since that slows down everything else, it is left to
  the user; the tests set it.

`rows_keep_their_bits()` tests whether it works. Fusions enabled in XLA_FLAGS, and the variable if set, are respected.
"""

import functools
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

EIGEN_WITH_ONEDNN = "TENSORFLOW_USE_CUSTOM_CONTRACTION_KERNEL"
os.environ.setdefault(EIGEN_WITH_ONEDNN, "0")

Build = Callable[[], tuple[jax.stages.Lowered, dict[str, str]]]
Get = Callable[[Any, Build], Callable[..., Any]]

FUSIONS = (
    "xla_cpu_experimental_ynn_fusion_type",
    "xla_cpu_experimental_xnn_fusion_type",
    "xla_cpu_experimental_onednn_fusion_type",
)
"""Options that list what XLA delegates to a library; an empty list disables it."""


def xla_flags(given: str) -> str:
    """XLA_FLAGS equivalent to `compiler_options()`, for code compiled without options (plain jax.numpy).

    Args:
        given: Flags to append to; fusions that they set are left alone.
    """
    return " ".join([given, *(f"--{name}=" for name in FUSIONS if name not in given)]).strip()


BROKEN = (
    "float32 rows are not bit-identical across batches on this machine: a row's bits depend on how many rows share its "
    "product. Setting NPROC=1 in the environment and no library fusion in XLA_FLAGS may help"
)
"""The engine's warning, and the skip reason of tests that need bit-identity."""

ROWS = (8, 16, 32, 48, 64, 128, 192, 320)
SHAPES = ((64, 64), (64, 272), (160, 64))  # (k, n), tested with the row counts of attention dots and larger ones
DEEP_ROWS = (64, 128, 192, 320)
DEEP_SHAPES = ((256, 768),)  # long sums, bit-identical only with the row counts of whole steps


def compiler_options() -> dict[str, str]:
    """Options for `lower(...).compile(...)` and for an outermost `jax.jit`; empty on devices other than CPU.

    Options unknown to this jaxlib are omitted; `rows_keep_their_bits` detects whether that matters.
    """
    return dict(cpu_options()) if jax.default_backend() == "cpu" else {}


@functools.cache
def cpu_options() -> dict[str, str]:
    given = os.environ.get("XLA_FLAGS", "")
    options = {name: "" for name in FUSIONS if not re.search(rf"{name}=\S", given)}
    lowered = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((), jnp.float32))
    while True:
        try:
            lowered.compile(options)
            return options
        except Exception as error:
            unknown = re.search(r"No such compile option: '(\w+)'", str(error))
            if not unknown:
                raise
            del options[unknown[1]]


def compiled(key: Any, build: Build) -> Callable[..., Any]:
    """Compiles what `build` lowers; whoever keeps executables on disk has a function that looks there first."""
    lowered, options = build()
    return lowered.compile(options)


@functools.cache
def rows_keep_their_bits(get: Get = compiled) -> bool:
    """Whether rows compiled with `compiler_options()` have the same bits as in a larger product.

    Tests float32 products of several shapes once per process: two compiles, about 0.2 s on one core. True on devices
    other than CPU, where bit-identity is not promised.

    Args:
        get: Gives the compiled function of a key, which it may know from an earlier process: (key, build).
    """
    if jax.default_backend() != "cpu":
        return True
    return not (differing(SHAPES, ROWS, get) or differing(DEEP_SHAPES, DEEP_ROWS, get))


def differing(
    shapes: Sequence[tuple[int, int]], rows: Sequence[int], get: Get = compiled
) -> list[tuple[int, int, int]]:
    """(rows, k, n) of float32 products [rows, k] x [k, n] that differ from the first rows of a larger one."""
    rng = np.random.default_rng(0)
    counts = (*rows, max(rows) + 64)
    factors = [[rng.normal(size=s).astype(np.float32) for s in ((counts[-1], k), (k, n))] for k, n in shapes]

    def products(factors: list[list[jax.Array]]) -> list[list[jax.Array]]:
        return [[x[:count] @ w for count in counts] for x, w in factors]

    run = get(("products", shapes, rows), lambda: (jax.jit(products).lower(factors), compiler_options()))
    results = jax.device_get(run(factors))  # a slice of an array on the device would be compiled
    return [
        (count, *shape)
        for shape, (*parts, whole) in zip(shapes, results, strict=True)
        for count, part in zip(rows, parts, strict=True)
        if not np.array_equal(part, whole[:count])
    ]
