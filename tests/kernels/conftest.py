"""Lowering for a GPU that is not there."""

from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh


@pytest.fixture
def lower_for_cuda() -> Callable[..., str]:
    """(f, *arguments, **options of jit) -> what an H200 would be given to compile."""
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh((), (), abstract_device=device)

    def lower(f: Callable[..., Any], *arguments: Any, **options: Any) -> str:
        with use_abstract_mesh(mesh):
            return jax.jit(f, **options).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()

    return lower
