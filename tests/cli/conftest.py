"""A model folder that compiles in seconds: two narrow layers, random weights, the byte tokenizer.

Packs ride alone: GEMMs this narrow change their last bits with the number of rows.
"""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from loquetier_jax.adapters.lora import LoraConfig, init_weights, resolve_shape
from loquetier_jax.adapters.peft import write_peft
from loquetier_jax.cli.job_bar import JobBar
from loquetier_jax.models.load import init_random
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.tiny import pretrain
from loquetier_jax.tiny.export import save_base
from tests.worlds import shared_functions

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
ENGINE = """\
max_model_len: 128
max_num_seqs: 4
max_adapters: 6
max_lora_rank: 16
train_pages: 2
logit_chunk: 64
compilation_cache_dir: ""
buckets:
  - {score_packs: 1, score_tokens: 64, prefill: 48, chunks: 3, decode: 16}
"""


@pytest.fixture(scope="session", autouse=True)
def _cli_world() -> Iterator[None]:
    """Commands share what their engines compile."""
    with shared_functions():
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder."""
    folder = tmp_path_factory.mktemp("model")
    config = pretrain.CONFIG | SIZES
    spec = DecoderSpec.from_hf(config)
    save_base(folder, config, spec, init_random(spec, jax.random.key(0), jnp.float32))
    return folder


@pytest.fixture(scope="session")
def engine_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine config for it."""
    path = tmp_path_factory.mktemp("config") / "engine.yaml"
    path.write_text(ENGINE)
    return path


@pytest.fixture(scope="session")
def options(model: Path, engine_yaml: Path) -> list[str]:
    """--model and --config."""
    return ["--model", str(model), "--config", str(engine_yaml)]


@pytest.fixture(scope="session")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT folder whose effect on greedy tokens is large."""
    spec = DecoderSpec.from_hf(model)
    lora = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear")
    shape = resolve_shape(lora, spec)
    weights = init_weights(shape, lora, spec, 3)
    for pair in weights.values():
        pair["lora_B"] = pair["lora_B"] + 0.2
    folder = tmp_path_factory.mktemp("adapter")
    write_peft(folder, weights, shape, spec, config=lora, base_model_name_or_path=None)
    return folder


@pytest.fixture
def stop_job(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Sends this process a signal once, when the first job that a command shows has made its first step."""
    waiting: list[int] = []
    update = JobBar.update

    def updated(bar: JobBar, job: Any) -> None:
        update(bar, job)
        if waiting and job.step == 1:
            signal.raise_signal(waiting.pop())

    def unexpected(signum: int, frame: Any) -> None:
        raise AssertionError(f"signal {signum} was left to its default")

    monkeypatch.setattr(JobBar, "update", updated)
    before = signal.signal(signal.SIGTERM, unexpected)
    yield waiting.append
    signal.signal(signal.SIGTERM, before)
