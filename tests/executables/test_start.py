"""A second start: neither traces nor lowers nor compiles, and answers with the same tokens."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import loquetier_jax.engine as engine_module
from loquetier_jax import Bucket, Engine, SamplingParams, TrainConfig
from loquetier_jax.executables import NOWHERE, Executables
from loquetier_jax.models.load import load_hf
from loquetier_jax.runtime import warmup
from loquetier_jax.tiny import base_path
from tests.engine.engines import add_random_adapter, base_params, build_engine, greedy, random_data, random_prompt
from tests.step.cases import tiny_spec

BUCKETS = (Bucket(prefill=16, chunks=1, decode=1),)
SAMPLED = SamplingParams(temperature=1.0, top_p=0.9, presence_penalty=0.5, seed=1, max_tokens=3, logprobs=2)


@pytest.fixture
def no_tracing() -> Iterator[None]:
    """Tracing raises, that of `jnp` functions outside jit as well; what was traced before is forgotten."""
    jax.clear_caches()
    jax.config.update("jax_no_tracing", True)
    yield
    jax.config.update("jax_no_tracing", False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first start has left."""
    return tmp_path_factory.mktemp("start")


@pytest.fixture(scope="module")
def base() -> Any:
    """(spec, params) of one layer; the weights are on the device before tracing is forbidden."""
    spec = tiny_spec(num_hidden_layers=1, sliding_window=(None,))
    return spec, base_params(spec)


def start(base: Any, folder: Path, buckets: tuple[Bucket, ...] = BUCKETS) -> Engine:
    """A new engine, which knows of the first start by the folder alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "executables_in", lambda _: Executables(folder))
        patch.setattr(warmup, "LEVELS", ("greedy", "full"))  # what is asked for below
        return build_engine("", *base, share=False, buckets=buckets, max_num_seqs=2, max_adapters=2)


def served(engine: Engine) -> list[Any]:
    """Tokens and log-probs of the base and of an adapter, greedy and sampled."""
    add_random_adapter(engine, "a", 0)
    prompt, said = random_prompt(np.random.default_rng(0), 20), []
    for params in (greedy(4), SAMPLED):
        for adapter in (None, "a"):
            (answer,) = engine.generate([prompt], params=params, adapter=adapter)
            said.append((answer.outputs[0].token_ids, answer.outputs[0].cumulative_logprob))
    engine.close()
    return said


@pytest.fixture(scope="module")
def first(folder: Path, base: Any) -> list[Any]:
    """What the first start served."""
    return served(start(base, folder))


def test_a_second_start_traces_nothing(first: list[Any], folder: Path, base: Any, no_tracing: None) -> None:
    assert served(start(base, folder)) == first


def test_a_first_start_traces(base: Any, tmp_path: Path, no_tracing: None) -> None:
    """So the test above would see it."""
    with pytest.raises(RuntimeError, match="no_tracing"):
        start(base, tmp_path)


def test_weights_are_loaded_without_tracing(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = tmp_path / "x"
    spec, expected = load_hf(base_path(), "float32", Executables(folder))
    request.getfixturevalue("no_tracing")
    again, params = load_hf(base_path(), "float32", Executables(folder))
    assert again == spec and jax.tree.all(jax.tree.map(np.array_equal, params, expected))
    with pytest.raises(RuntimeError, match="no_tracing"):
        load_hf(base_path(), "bfloat16", NOWHERE)


@pytest.mark.slow
def test_a_job_of_a_second_start_compiles_nothing(base: Any, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Its first arrays are made by `jnp` outside jit, which traces; its functions are loaded."""

    def trained() -> list[float]:
        engine = start(base, tmp_path / "x", (*BUCKETS, Bucket(packs=1, pack_tokens=64)))
        job = engine.finetune("j", data=random_data(0), train=TrainConfig(max_steps=2, pack_tokens=64))
        job.wait()
        engine.close()
        return [line["loss"] for line in job.metrics if "loss" in line]

    losses, jax_compiles = trained(), []
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(lambda e, _, **k: jax_compiles.append(k.get("fun_name")))
    assert trained() == losses and losses
    ours = {"forward", "backward", "optimizer", "unified_step", "zeros", "sample", "admit", "write_page"}
    assert not [name for name in jax_compiles if name and any(word in name for word in ours)]


@pytest.mark.slow
def test_the_command_answers_at_once_the_second_time(tmp_path: Path) -> None:
    """As a user starts it, twice: the second process may not trace."""
    answers = []
    for forbidden in ("False", "True"):
        command = "import sys, jax; from loquetier_jax.cli import main"
        command += f"; jax.config.update('jax_no_tracing', {forbidden})"
        command += "; sys.exit(main(['generate', 'count: 3 4 5 6', '--max-tokens', '16']))"
        environment = os.environ | {"HOME": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", command], env=environment, stdout=subprocess.PIPE, check=True)
        answers.append(done.stdout)
    assert answers[0] == answers[1] and b"7 8 9" in answers[0]
