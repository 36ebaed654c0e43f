"""XLA on a CPU, told to compute a row of a product with the same bits however many rows share the product.

Three things choose the order of a row's sum by microarchitecture, number of threads and number of rows (measured on
Zen 3, Sapphire Rapids and Zen 5 with jaxlib 0.10.2 and 0.11.2):

- YNNPACK, into which XLA fuses dots by default, and its like (XNNPACK, oneDNN), off by default today. They are
  compiler options: `compiler_options()`.
- oneDNN's SGEMM, with which Eigen multiplies what is not fused: on AVX2 the last rows of a product take another path
  (the last two of 128). It is no compiler option: Eigen reads an environment variable before its first product.
  Importing this module sets it, unless the user has.
- Eigen's threads: from about four on, some products of some 128 rows are split along the sum. How many there are is
  fixed when jax starts; NPROC=1 in the environment makes it one. That would slow everything else down, so it is the
  user's to say; the tests do.

`rows_keep_their_bits()` looks whether it holds. Whoever switches a fusion on in XLA_FLAGS, or sets the variable, has
decided and is not overruled.
"""

import functools
import os
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

EIGEN_WITH_ONEDNN = "TENSORFLOW_USE_CUSTOM_CONTRACTION_KERNEL"
os.environ.setdefault(EIGEN_WITH_ONEDNN, "0")

FUSIONS = (
    "xla_cpu_experimental_ynn_fusion_type",
    "xla_cpu_experimental_xnn_fusion_type",
    "xla_cpu_experimental_onednn_fusion_type",
)
"""Lists of what XLA hands to a library; empty, they switch it off."""


def xla_flags(given: str) -> str:
    """XLA_FLAGS that say the same as `compiler_options()`, for code that compiles without options (plain jax.numpy).

    Args:
        given: Flags to be added to; a fusion that they name stays as it is.
    """
    return " ".join([given, *(f"--{name}=" for name in FUSIONS if name not in given)]).strip()


BROKEN = (
    "bit-identity of float32 rows does not hold on this machine: a row's bits depend on how many rows share its "
    "product. NPROC=1 in the environment, and no library fusion in XLA_FLAGS, make it hold where XLA can"
)
"""What an engine says once, and the reason of tests that need it."""

ROWS = (8, 16, 32, 48, 64, 128, 192, 320)
SHAPES = ((64, 64), (64, 272), (160, 64))  # (k, n): as many rows as an attention's dots have, and more
DEEP_ROWS = (64, 128, 192, 320)
DEEP_SHAPES = ((256, 768),)  # sums this long need the rows of a whole step


def compiler_options() -> dict[str, str]:
    """Options for `lower(...).compile(...)` and for an outermost `jax.jit`; empty on any other device than a CPU.

    Names that this jaxlib does not know are left out: what it computes then, `rows_keep_their_bits` finds out.
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


@functools.cache
def rows_keep_their_bits() -> bool:
    """Whether, compiled with `compiler_options()`, rows have the bits that they have in a larger product.

    Looks at float32 products of several shapes, once a process: two compiles, about 0.2 s on one core. True on a
    device that is no CPU: nothing of the kind is promised there.
    """
    return jax.default_backend() != "cpu" or not (differing(SHAPES, ROWS) or differing(DEEP_SHAPES, DEEP_ROWS))


def differing(shapes: Sequence[tuple[int, int]], rows: Sequence[int]) -> list[tuple[int, int, int]]:
    """(rows, k, n) of float32 products [rows, k] x [k, n] that differ from the first rows of a larger one."""
    rng = np.random.default_rng(0)
    counts = (*rows, max(rows) + 64)
    factors = [[rng.normal(size=s).astype(np.float32) for s in ((counts[-1], k), (k, n))] for k, n in shapes]

    def products(factors: list[list[jax.Array]]) -> list[list[jax.Array]]:
        return [[x[:count] @ w for count in counts] for x, w in factors]

    results = jax.jit(products).lower(factors).compile(compiler_options())(factors)
    return [
        (count, *shape)
        for shape, (*parts, whole) in zip(shapes, results, strict=True)
        for count, part in zip(rows, parts, strict=True)
        if not np.array_equal(part, whole[:count])
    ]
