"""Loading: streamed and strict; and random parameters."""

import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from loquetier_jax.errors import ModelError
from loquetier_jax.models import load
from loquetier_jax.models.checkpoint import Checkpoint
from loquetier_jax.models.spec import GROUPS, DecoderSpec
from tests.models.checkpoints import draw_tensors

CONFIG: dict[str, Any] = {
    "model_type": "qwen2", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40, "torch_dtype": "float16",
}  # fmt: skip
V_PROJ = "model.layers.1.self_attn.v_proj.weight"


def write(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], shards: int = 3) -> Path:
    """A model folder whose shards cut across layers and fused groups."""
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for shard in range(shards):
        part = dict(list(tensors.items())[shard::shards])
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


@pytest.fixture
def spec() -> DecoderSpec:
    return DecoderSpec.from_hf(CONFIG)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_number_arrives(dtype: str, spec: DecoderSpec, tmp_path: Path) -> None:
    tensors = draw_tensors(spec, jnp.dtype(dtype))
    loaded, params = load.load_hf(write(tmp_path, CONFIG, tensors), dtype)
    assert loaded == spec
    expected_shapes = load.param_shapes(spec, dtype)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(
        lambda a: (a.shape, a.dtype), expected_shapes
    )
    np.testing.assert_array_equal(params["embed_tokens"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["lm_head"].w, tensors["lm_head.weight"].T)
    attention = "model.layers.1.self_attn."
    for key, suffix in (("w", "weight"), ("bias", "bias")):
        parts = [tensors[f"{attention}{target}.{suffix}"].T for target in GROUPS["qkv_proj"]]
        np.testing.assert_array_equal(getattr(params["layers"][1]["qkv_proj"], key), np.concatenate(parts, axis=-1))


def test_single_file_and_default_dtype(spec: DecoderSpec, tmp_path: Path) -> None:
    tensors = draw_tensors(spec)
    tensors[V_PROJ] = tensors[V_PROJ].astype(np.float16)  # a group of mixed dtypes
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, tmp_path / "model.safetensors")
    params = load.load_hf(tmp_path)[1]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float16"}
    np.testing.assert_array_equal(params["layers"][1]["qkv_proj"].w[:, -8:], tensors[V_PROJ].T)


def test_harmless_extras_are_skipped(tmp_path: Path) -> None:
    tensors = draw_tensors(DecoderSpec.from_hf(CONFIG))
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
    load.load_hf(write(tmp_path, CONFIG, tensors))


def test_the_host_holds_one_parameter_at_a_time(tmp_path: Path) -> None:
    config = {**CONFIG, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 24}
    tensors = draw_tensors(DecoderSpec.from_hf(config))
    total = sum(t.nbytes for t in tensors.values())
    folder = write(tmp_path, config, tensors)
    load.load_hf(folder, "bfloat16")  # compiles, imports
    tracemalloc.start()
    params = load.load_hf(folder, "bfloat16")[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = 4 * max(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    # Its tensors, and their concatenation; headers and Python objects beside.
    assert peak < 2 * largest + 1_000_000 < total / 8


def edited(case: str, tensors: dict[str, np.ndarray]) -> str:
    """Spoils a tensor; returns what the message must say."""
    if case == "missing":
        del tensors[V_PROJ]
        return f"missing tensor {V_PROJ}"
    if case == "extra":
        tensors["model.layers.0.self_attn.o_proj.bias"] = np.zeros(16, np.float32)
        return r"unexpected tensor model\.layers\.0\.self_attn\.o_proj\.bias"
    if case == "untied head missing":
        del tensors["lm_head.weight"]
        return r"missing tensor lm_head\.weight"
    if case == "shape":
        tensors[V_PROJ] = np.zeros((8, 15), np.float32)
        return rf"{V_PROJ}: has shape \(8, 15\) in .*, expected \(8, 16\)"
    tensors[V_PROJ] = np.zeros((8, 16), np.int8)
    return rf"{V_PROJ}: has dtype I8"


@pytest.mark.parametrize("case", ["missing", "extra", "untied head missing", "shape", "dtype"])
def test_wrong_tensors_are_named_before_any_is_read(
    case: str, spec: DecoderSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = draw_tensors(spec)
    message = edited(case, tensors)
    reads: list[str] = []
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: reads.append(name))
    with pytest.raises(ModelError, match=message):
        load.load_hf(write(tmp_path, CONFIG, tensors))
    assert not reads


def test_wrong_files_are_named(spec: DecoderSpec, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: no such folder"):
        load.load_hf(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(
        ModelError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"
    ):
        load.load_hf(tmp_path)
    write(tmp_path, CONFIG, draw_tensors(spec))
    with pytest.raises(ModelError, match="dtype: got 'int8'"):
        load.load_hf(tmp_path, "int8")
    shard = tmp_path / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    with pytest.raises(ModelError, match=r"model-00002-of-00003\.safetensors: not a readable safetensors"):
        load.load_hf(tmp_path)
    shard.write_bytes((tmp_path / "model-00001-of-00003.safetensors").read_bytes())
    with pytest.raises(ModelError, match=r"is in both model-00001-of-00003\.safetensors and model-00002"):
        load.load_hf(tmp_path)
    shard.unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00003\.safetensors: no such file, though"):
        load.load_hf(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {V_PROJ: "../other.safetensors"}}))
    with pytest.raises(ModelError, match=r"got '\.\./other\.safetensors'"):
        load.load_hf(tmp_path)


def test_random_parameters(spec: DecoderSpec) -> None:
    params = load.init_random(spec, jax.random.key(3), "bfloat16")
    again = load.init_random(spec, jax.random.key(3), "bfloat16")
    assert jax.tree.structure(params) == jax.tree.structure(load.param_shapes(spec, "bfloat16"))
    assert all(a.dtype == jnp.bfloat16 for a in jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    first, second = params["layers"]
    assert not np.array_equal(first["o_proj"].w, second["o_proj"].w)
    np.testing.assert_allclose(np.std(np.asarray(first["gate_up_proj"].w, np.float32)), 16**-0.5, rtol=0.1)
    np.testing.assert_array_equal(first["input_layernorm"], np.ones(16))
    np.testing.assert_array_equal(first["qkv_proj"].bias, np.zeros(32))
