"""Settings of the whole suite: strict jax, bits that do not depend on the machine, markers, what runs where."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Set before jax is imported, and in the environment, so that the processes which tests start share it.
CACHE = Path(__file__).parent.parent / ".pytest_cache" / "xla"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# One thread for XLA: the suite uses the cores by processes, and sums are the same on every machine.
os.environ["NPROC"] = "1"
# Nothing in the suite may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Where CI is set pytest writes failed comparisons out in full, also those that a test expects to fail: for the bits of
# a whole engine that takes it minutes each.
for variable in ("CI", "BUILD_NUMBER"):
    os.environ.pop(variable, None)

import jax
import jaxtyping

from tests.typechecking import PACKAGES

# Before the first of them is imported; in every process of pytest-xdist, too: each reads this file.
jaxtyping.install_import_hook(PACKAGES, "tests.typechecking.checked")

from pallas_kernels.common import cpu_bits
from tests.worlds import shared_functions

# Read when the backend starts: plain jax.numpy in tests multiplies as an engine does.
os.environ["XLA_FLAGS"] = cpu_bits.xla_flags(os.environ.get("XLA_FLAGS", ""))

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

TESTS = Path(__file__).parent
PLAIN = {TESTS / folder for folder in ("adapters", "executables", "train", "kernels", "models", "step")}
"""Where most time goes into compiling what no user runs: references, kernels in interpret mode."""
PARITY = {"test_parity_families", "test_parity_peft", "test_parity_training"}
EMBEDDED = {"test_examples", "test_demo"}


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Where pytest-timeout is not installed tests have no limit, and its setting is no error."""
    if not pluginmanager.has_plugin("timeout"):
        parser.addini("timeout", "seconds that a test may take; pytest-timeout obeys it")


def pytest_configure(config: pytest.Config) -> None:
    """Known without pytest-xdist, too."""
    config.addinivalue_line("markers", "xdist_group(name): tests that one worker runs")


def worker_group(item: pytest.Item) -> str:
    """The tests that one worker should run, because they share compiled functions (see tests/worlds.py).

    That of a test's own mark, where it has one.
    """
    if mark := item.get_closest_marker("xdist_group"):
        return str(mark.args[0])
    path = item.path
    if path.parent == TESTS / "engine":
        return "1-families" if path.stem in PARITY else "0-engine"
    if path.stem in EMBEDDED:
        return "1-embedded"
    if path.parent == TESTS / "cli":
        return "1-cli"
    return str(path.relative_to(TESTS))


@pytest.hookimpl(tryfirst=True)  # `-m` is to see the marks that are added here
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Groups tests by what they compile, the longest groups first; skips what this machine has no devices for.

    Where there is a GPU, `also_gpu` is `gpu`.
    """
    gpu = jax.default_backend() == "gpu"
    for item in items:
        item.add_marker(pytest.mark.xdist_group(worker_group(item)))
        if item.name.split("[")[0].endswith("_would_be_seen"):
            item.add_marker(pytest.mark.mutation)
        if item.get_closest_marker("also_gpu") and gpu:
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
    items.sort(key=lambda item: min(worker_group(item), "2"))


@pytest.hookimpl(tryfirst=True)  # before fixtures compile
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Where rows do not keep their bits, tests of bit-identity fail with that reason."""
    bits = item.get_closest_marker("bits") is not None
    optimize(bits or item.path.parent not in PLAIN or jax.default_backend() == "gpu")
    if bits and not cpu_bits.rows_keep_their_bits():
        pytest.fail(cpu_bits.BROKEN, pytrace=False)


def optimize(wanted: bool) -> None:
    """Compiles from now on as users do, or in two thirds of the time without most of LLVM's optimizations."""
    if _optimized != [wanted]:
        _optimized[:] = [wanted]
        jax.config.update("jax_disable_most_optimizations", not wanted)
        jax.clear_caches()  # jit would hand out what it compiled the other way


_optimized = [True]


@pytest.fixture(scope="session", autouse=True)
def full_precision() -> None:
    """Products of float32 are float32's on a GPU too, where XLA would take TF32; in every thread."""
    if jax.default_backend() == "gpu":
        jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session")
def compilation_cache_dir() -> str:
    """Pass it to EngineConfig: engines keep no executables, and leave jax its own cache, shared by all tests and runs.

    A test may patch what is traced. jax's cache sees that in the program; an executable's key does not.
    """
    return ""


@pytest.fixture(scope="session")
def cache_home() -> Path:
    """The home of processes and commands that are started as a user starts them: they keep executables there."""
    return CACHE.parent


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Annotations are not enforced: for tests of what a function itself says to a wrong shape or type."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def embedded_world(cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Engines made by commands and examples share compiled functions; what they keep on disk is in a folder of ours."""
    monkeypatch.setenv("HOME", str(cache_home))
    with shared_functions():
        yield
