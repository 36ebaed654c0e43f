"""Settings of the whole suite: strict jax, one shared compilation cache, markers obeyed by backend."""

import os
from pathlib import Path

import pytest

# Set before jax is imported, and in the environment, so that the processes which tests start share it.
CACHE = Path(__file__).parent.parent / ".pytest_cache" / "xla"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Nothing in the suite may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Where CI is set pytest writes failed comparisons out in full, also those that a test expects to fail: for the bits of
# a whole engine that takes it minutes each.
for variable in ("CI", "BUILD_NUMBER"):
    os.environ.pop(variable, None)

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Where pytest-timeout is not installed tests have no limit, and its setting is no error."""
    if not pluginmanager.has_plugin("timeout"):
        parser.addini("timeout", "seconds that a test may take; pytest-timeout obeys it")


@pytest.hookimpl(tryfirst=True)  # `-m gpu` is to see the marks that are added here
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips what this machine has no devices for; where it has a GPU, `also_gpu` is `gpu`."""
    gpu = jax.default_backend() == "gpu"
    for item in items:
        if item.get_closest_marker("also_gpu") and gpu:
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if item.get_closest_marker("multi_device") and jax.device_count() < 2:
            item.add_marker(pytest.mark.skip(reason="needs several devices"))


@pytest.fixture(scope="session", autouse=True)
def full_precision() -> None:
    """Products of float32 are float32's on a GPU too, where XLA would take TF32; in every thread."""
    if jax.default_backend() == "gpu":
        jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session")
def compilation_cache_dir() -> str:
    """The folder of XLA programs shared by all tests and runs; pass it to EngineConfig."""
    return str(CACHE)
