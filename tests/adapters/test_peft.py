"""Folders that real PEFT writes and reads, and what is refused in a folder."""

import dataclasses
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loquetier_jax.adapters.lora import LoraConfig, resolve_shape
from loquetier_jax.adapters.peft import CONFIG_FILE, WEIGHTS_FILE, fingerprint, read_peft, write_peft
from loquetier_jax.errors import AdapterError
from tests.adapters.cases import MIXED, SPEC, assert_same, our_deltas, peft_deltas, random_weights, uniform

# PEFT itself reads a property that transformers 5 renames.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

CASES = {
    "default": {},
    "suffixes": {"r": 5, "lora_alpha": 7, "target_modules": ["q_proj", "up_proj"]},
    "rslora": {"r": 16, "lora_alpha": 16, "use_rslora": True, "target_modules": ["k_proj", "down_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj", "o_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, r".*\.1\.self_attn.v_proj": 17, "o_proj": 40},
        "alpha_pattern": {"q_proj": 32, "model.layers.1.self_attn.v_proj": 3},
    },
    "all_linear": {"r": 3, "target_modules": "all-linear"},
    "all_linear_excluding": {
        "r": 3, "target_modules": "all-linear", "exclude_modules": ["o_proj", "layers.0.mlp.up_proj"],
    },
    "regex": {"r": 8, "target_modules": r"model\.layers\.1\.(self_attn\.[qk]|mlp\.gate)_proj"},
    "regex_rslora_patterns": {
        "r": 6, "use_rslora": True, "target_modules": r".*(gate|up)_proj",
        "rank_pattern": {"up_proj": 9}, "alpha_pattern": {r"layers\.1\..*": 5},
    },
    "full_and_suffix": {
        "target_modules": ["model.layers.0.mlp.gate_proj", "v_proj"], "layers_to_transform": [1],
    },
    "gaussian": {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
    "dead_target": {"target_modules": ["q_proj", "query_key_value"]},
}


@pytest.mark.parametrize("case", CASES)
def test_reads_what_peft_writes(base, tmp_path: Path, case: str) -> None:
    import torch
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    model = get_peft_model(base(), PeftLoraConfig(task_type="CAUSAL_LM", **CASES[case]))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    config, shape, weights = read_peft(tmp_path, SPEC)
    assert_same(our_deltas(weights, shape), peft_deltas(model))
    if case != "dead_target":
        # The same settings given to us mean the same modules, ranks and scalings.
        assert resolve_shape(LoraConfig(**CASES[case]), SPEC) == shape
    assert config.lora_dropout == CASES[case].get("lora_dropout", 0.0)
    assert {leaf.dtype for w in weights.values() for leaf in w.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("case", ["uniform", "mixed", *CASES])
def test_peft_reads_what_we_write(base, tmp_path: Path, case: str) -> None:
    from peft import PeftModel

    if case in CASES:
        shape = resolve_shape(LoraConfig(**CASES[case]), SPEC, strict=False)
    else:
        shape = {"uniform": uniform(8), "mixed": MIXED}[case]
    weights = random_weights(shape)
    write_peft(tmp_path / "adapter", weights, shape, SPEC, base_model_name_or_path="base")
    again = read_peft(tmp_path / "adapter", SPEC)
    assert again.shape == shape  # scalings to the last bit
    assert all(np.array_equal(again.weights[k][n], weights[k][n]) for k in weights for n in weights[k])
    model = base()
    with warnings.catch_warnings():
        # PEFT only warns of missing keys.
        warnings.simplefilter("error", UserWarning)
        model = PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert_same(peft_deltas(model), our_deltas(weights, shape))


def test_written_config_is_plain(tmp_path: Path) -> None:
    config = LoraConfig(r=8, lora_alpha=24, use_rslora=True, target_modules=["q_proj", "o_proj"])
    config = dataclasses.replace(config, lora_dropout=0.05)
    shape = resolve_shape(config, SPEC)
    write_peft(tmp_path / "a" / "b", random_weights(shape), shape, SPEC, config=config)
    text = (tmp_path / "a" / "b" / CONFIG_FILE).read_text()
    fields = json.loads(text)
    assert text == json.dumps(fields, indent=2, sort_keys=True) + "\n"
    assert {k: fields[k] for k in ("r", "lora_alpha", "use_rslora", "lora_dropout")} == {
        "r": 8, "lora_alpha": 24, "use_rslora": True, "lora_dropout": 0.05,
    }
    assert fields["target_modules"] == ["o_proj", "q_proj"]
    assert fields["rank_pattern"] == fields["alpha_pattern"] == {}
    assert read_peft(tmp_path / "a" / "b", SPEC).config == config


def test_transposed_views_are_written_as_they_read(tmp_path: Path) -> None:
    weights = random_weights(MIXED)
    views = {k: {n: np.ascontiguousarray(a.T).T for n, a in w.items()} for k, w in weights.items()}
    write_peft(tmp_path / "adapter", views, MIXED, SPEC)
    again = read_peft(tmp_path / "adapter", SPEC).weights
    assert all(np.array_equal(again[k][n], weights[k][n]) for k in weights for n in weights[k])


def test_writing_replaces_an_adapter_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    write_peft(folder, random_weights(MIXED), MIXED, SPEC)
    before = fingerprint(folder)
    write_peft(folder, random_weights(uniform(4)), uniform(4), SPEC)
    assert fingerprint(folder) != before and read_peft(folder, SPEC).shape == uniform(4)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    (folder / "optimizer.bin").write_text("precious")
    with pytest.raises(AdapterError, match=r"optimizer\.bin"):
        write_peft(folder, random_weights(MIXED), MIXED, SPEC)
    with pytest.raises(AdapterError, match=r"layers\.0\.down_proj"):
        write_peft(tmp_path / "new", {}, MIXED, SPEC)
    assert read_peft(folder, SPEC).shape == uniform(4) and [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_peft(tmp_path / "adapter", random_weights(MIXED), MIXED, SPEC)
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True), ("modules_to_save", ["lm_head"]), ("bias", "lora_only"), ("bias", "all"),
        ("lora_bias", True), ("init_lora_weights", "pissa"), ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"), ("init_lora_weights", "corda"), ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"), ("trainable_token_indices", [1]), ("layer_replication", [[0, 2]]),
        ("fan_in_fan_out", True), ("target_parameters", ["mlp.w"]), ("use_qalora", True),
        ("alora_invocation_tokens", [1]), ("use_bdlora", {"a": 1}), ("layers_pattern", "h"),
        ("some_future_variant", {"on": True}), ("peft_type", "LOHA"),
        ("peft_type", None), ("task_type", "SEQ_CLS"), ("r", 0), ("lora_alpha", "16"),
        ("target_modules", ["lm_head", "q_proj"]), ("target_modules", ["c_attn"]),
        ("rank_pattern", {"layers.0.*down_proj": 4}),
    ],
)
def test_unsupported_keys_are_refused_by_name(folder: Path, key: str, value: object) -> None:
    fields = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(fields | {key: value}))
    named = "down_proj" if key == "rank_pattern" else key  # the tensor has another rank
    with pytest.raises(AdapterError, match=named):
        read_peft(folder, SPEC)


def test_empty_keys_of_newer_versions_are_accepted(folder: Path) -> None:
    fields = json.loads((folder / CONFIG_FILE).read_text())
    new = {"new_variant": None, "use_new": False, "new_config": {}}
    layers = {"layers_pattern": "layers", "layers_to_transform": []}
    (folder / CONFIG_FILE).write_text(json.dumps(fields | new | layers))
    assert read_peft(folder, SPEC).shape == MIXED


PREFIX = "base_model.model."


@pytest.mark.parametrize(
    ("tensor", "size", "why"),
    [
        ("model.layers.0.self_attn.q_proj.lora_magnitude_vector", (32,), "DoRA"),
        ("model.layers.0.self_attn.q_proj.lora_B.bias", (32,), "lora_bias"),
        ("model.layers.0.self_attn.q_proj.base_layer.bias", (32,), "biases"),
        ("model.embed_tokens.lora_embedding_A", (4, 64), "embed"),
        ("model.embed_tokens.token_adapter.trainable_tokens_delta", (1, 24), "trainable_token_indices"),
        ("lm_head.lora_A.weight", (4, 24), "head"),
        ("lm_head.weight", (64, 24), "head"),
        ("model.layers.2.self_attn.q_proj.lora_A.weight", (4, 24), "no such module"),
        ("model.layers.0.mlp.q_proj.lora_A.weight", (4, 24), "no such module"),
        ("model.layers.0.self_attn.k_proj.lora_A.weight", (4, 24), "target_modules"),
    ],
)
def test_unknown_tensors_are_refused_by_name(folder: Path, tensor: str, size: tuple, why: str) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file(tensors | {PREFIX + tensor: np.zeros(size, np.float32)}, folder / WEIGHTS_FILE)
    with pytest.raises(AdapterError, match=rf"(?s){tensor}.*{why}"):
        read_peft(folder, SPEC)


def test_missing_and_misshapen_tensors_are_refused_by_name(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    name = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_B.weight"
    save_file(tensors | {name: tensors[name].T.copy()}, folder / WEIGHTS_FILE)
    with pytest.raises(AdapterError, match=rf"{name}.*\(40, 32\).*\(32, 40\)"):
        read_peft(folder, SPEC)
    save_file(tensors | {name: np.zeros((32, 40), np.int8)}, folder / WEIGHTS_FILE)
    with pytest.raises(AdapterError, match=rf"{name}.*I8"):
        read_peft(folder, SPEC)
    del tensors[name]
    save_file(tensors, folder / WEIGHTS_FILE)
    with pytest.raises(AdapterError, match=name):
        read_peft(folder, SPEC)


def test_half_precision_is_widened(folder: Path) -> None:
    import ml_dtypes

    halves = {k: v.astype(ml_dtypes.bfloat16) for k, v in load_file(folder / WEIGHTS_FILE).items()}
    save_file(halves, folder / WEIGHTS_FILE)
    b = read_peft(folder, SPEC).weights["layers.0.q_proj"]["lora_B"]
    assert b.dtype == np.float32
    half = halves[f"{PREFIX}model.layers.0.self_attn.q_proj.lora_B.weight"]
    np.testing.assert_array_equal(b, half.astype(np.float32))


def test_unreadable_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such file"):
        read_peft(tmp_path / "nowhere", SPEC)
    good = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(good[:100])
    with pytest.raises(AdapterError, match=WEIGHTS_FILE):
        read_peft(folder, SPEC)
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="convert"):
        read_peft(folder, SPEC)
    (folder / WEIGHTS_FILE).write_bytes(good)
    for text in ("{", "[1]", "\ufeff"):
        (folder / CONFIG_FILE).write_text(text)
        with pytest.raises(AdapterError, match=CONFIG_FILE):
            read_peft(folder, SPEC)
