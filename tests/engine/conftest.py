"""Engines shared by the tests of the engine: one a session where a test leaves no trace, fresh ones on demand."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from loquetier_jax.engine import Engine
from loquetier_jax.tiny.tokenizer import build_tokenizer
from loquetier_jax.train.data import Dataset
from tests.engine.engines import build_engine, random_data, reset
from tests.engine.parity import open_family


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Bytes and a few special tokens: 272 ids, the vocabulary of `tiny_spec()`."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def make_engine(compilation_cache_dir: str) -> Callable[..., Engine]:
    """`engines.build_engine` over the shared compilation cache: a fresh engine, (spec, params, share, **changes)."""
    return partial(build_engine, compilation_cache_dir)


@pytest.fixture(scope="session")
def session_engine(make_engine: Callable[..., Engine], tokenizer: Any) -> Engine:
    """The one engine behind `tiny_engine`; do not use it directly."""
    return make_engine(tokenizer=tokenizer)


@pytest.fixture
def tiny_engine(session_engine: Engine) -> Iterator[Engine]:
    """An engine with a tokenizer and no adapter, request or job; shared by the session, emptied after each test."""
    reset(session_engine)
    yield session_engine
    reset(session_engine)


@pytest.fixture
def datasets() -> Callable[..., Dataset]:
    """`engines.random_data`: (seed, count=20, low=5, high=40) -> Dataset of random samples, 3/4 of tokens learnt."""
    return random_data


@pytest.fixture(scope="session")
def checkpoints_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the checkpoints of `family_engine` lie."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture
def family_engine(checkpoints_root: Path, compilation_cache_dir: str) -> Iterator[Callable[[str], Engine]]:
    """family -> `parity.open_family`'s engine; shared by the session, emptied after each test."""
    opened: list[Engine] = []

    def open_one(family: str) -> Engine:
        opened.append(open_family(family, checkpoints_root, compilation_cache_dir))
        return opened[-1]

    yield open_one
    for engine in opened:
        reset(engine)
