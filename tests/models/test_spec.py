"""Reading configs: both forms, every default, and a refusal that names what is not supported."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loquetier_jax.errors import ModelError
from loquetier_jax.models.rope import Llama3Rope
from loquetier_jax.models.spec import GROUPS, MODULES, DecoderSpec

# The files of the Hub, abridged to what is read.
LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072,
    "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 128256,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
}  # fmt: skip
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96,
}  # fmt: skip


def small(model_type: str, **values: Any) -> DecoderSpec:
    return DecoderSpec.from_hf({**SMALL, "model_type": model_type, **values})


def test_a_hub_config_is_read_whole() -> None:
    spec = DecoderSpec.from_hf(LLAMA_3_1_8B)
    assert spec.rope_theta == 500000.0
    assert spec.rope_scaling == Llama3Rope(8.0, 1.0, 4.0, 8192)
    assert spec.eos_token_ids == (128001, 128008, 128009)
    assert (spec.bos_token_id, spec.pad_token_id, spec.dtype) == (128000, None, "bfloat16")
    assert (spec.head_dim, spec.rms_norm_eps, spec.sliding_window) == (128, 1e-5, (None,) * 32)
    assert spec.group_shapes == {
        "qkv_proj": (4096, (4096, 1024, 1024)),
        "o_proj": (4096, (4096,)),
        "gate_up_proj": (4096, (14336, 14336)),
        "down_proj": (14336, (4096,)),
    }
    assert spec.target_shapes["v_proj"] == (4096, 1024)
    assert sorted(MODULES) == sorted(t for targets in GROUPS.values() for t in targets)
    assert hash(spec) == hash(DecoderSpec.from_hf(LLAMA_3_1_8B))


def test_transformers_5_form_reads_the_same() -> None:
    new = {k: v for k, v in LLAMA_3_1_8B.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    new["rope_parameters"] = {**LLAMA_3_1_8B["rope_scaling"], "rope_theta": 500000.0}
    new["dtype"] = "bfloat16"
    assert DecoderSpec.from_hf(new) == DecoderSpec.from_hf(LLAMA_3_1_8B)
    assert DecoderSpec.from_hf(SimpleNamespace(to_dict=lambda: new)) == DecoderSpec.from_hf(new)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral", "gemma"])
def test_absent_keys_mean_what_transformers_means(model_type: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"} | {"num_attention_heads": 32}
    filled = transformers.AutoConfig.for_model(model_type, head_dim=8, **config)
    ours = DecoderSpec.from_hf({**config, "model_type": model_type, "head_dim": 8})
    theirs = DecoderSpec.from_hf(filled)
    assert ours.num_key_value_heads == theirs.num_key_value_heads
    filled = transformers.AutoConfig.for_model(model_type, **SMALL)
    ours, theirs = small(model_type), DecoderSpec.from_hf(filled)
    for name in (
        "head_dim",
        "rope_theta",
        "tie_word_embeddings",
        "sliding_window",
        "max_position_embeddings",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (ours.rms_norm_eps, ours.hidden_act) == (theirs.rms_norm_eps, theirs.hidden_act)


def test_biases_by_family() -> None:
    def biases(spec: DecoderSpec) -> tuple[bool, ...]:
        return tuple(spec.has_bias(group) for group in GROUPS)

    assert biases(small("qwen2")) == (True, False, False, False)
    assert biases(small("qwen3", attention_bias=True)) == (True, True, False, False)
    assert biases(small("llama", mlp_bias=True)) == (False, False, True, True)
    assert biases(small("mistral", attention_bias=True)) == (False,) * 4  # the key means nothing there


def test_windows() -> None:
    assert small("mistral", sliding_window=None).sliding_window == (None,) * 3
    assert small("qwen2", sliding_window=8).sliding_window == (None,) * 3
    used = {"use_sliding_window": True, "sliding_window": 8}
    assert small("qwen2", **used, max_window_layers=2).sliding_window == (None, None, 8)
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    assert small("qwen3", **used, layer_types=types).sliding_window == (8, None, 8)


def test_gemma_activation_quirks() -> None:
    assert small("gemma", hidden_act="gelu").hidden_act == "gelu_pytorch_tanh"
    assert small("gemma", hidden_act="gelu", hidden_activation=None).hidden_act == "gelu_pytorch_tanh"
    assert small("gemma", hidden_activation="gelu_pytorch_tanh").hidden_act == "gelu_pytorch_tanh"
    assert small("llama", hidden_act="gelu").hidden_act == "gelu"


def test_either_config_may_name_end_tokens(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "model_type": "llama", "eos_token_id": 2}))
    assert DecoderSpec.from_hf(tmp_path).eos_token_ids == (2,)
    for value, expected in ((7, (2, 7)), ([7, 9, 2, 7], (2, 7, 9)), (None, (2,))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        assert DecoderSpec.from_hf(tmp_path).eos_token_ids == expected
    assert DecoderSpec.from_hf(tmp_path / "config.json").eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json: not valid JSON"):
        DecoderSpec.from_hf(str(tmp_path))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gemma2": ({"model_type": "gemma2"}, "model_type: 'gemma2'"),
    "no type": ({"model_type": None}, "model_type: None"),
    "classifier": ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    "experts": ({"num_local_experts": 8}, "num_local_experts: 8"),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config: .*gptq"),
    "soft cap": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping: 30.0"),
    "yarn": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling: rope_type 'yarn'"),
    "linear": ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
    "rope key": ({"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "mrope_section"),
    "rope per layer": ({"rope_parameters": {"full_attention": {}}}, "one rope per layer type"),
    "half llama3": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"low_freq_factor: got None"),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
    "theta": ({"rope_theta": -1.0}, "rope_theta: got -1.0"),
    "missing": ({"hidden_size": None}, "hidden_size: got None"),
    "layers": ({"num_hidden_layers": 0}, "num_hidden_layers: got 0"),
    "heads": ({"num_key_value_heads": 3}, "num_key_value_heads: got 3"),
    "odd": ({"head_dim": 7}, "head_dim: got 7"),
    "width": ({"hidden_size": 30}, "hidden_size: got 30"),
    "act": ({"hidden_act": "mish"}, "hidden_act: 'mish'"),
    "act twice": (
        {"hidden_act": "silu", "hidden_activation": "gelu"},
        "'gelu' contradicts hidden_act 'silu'",
    ),
    "eps": ({"rms_norm_eps": "small"}, "rms_norm_eps: got 'small'"),
    "eos": ({"eos_token_id": ["</s>"]}, "eos_token_id: got"),
    "chunked": ({"model_type": "qwen3", "layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
    "short list": ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "layer_types: got"),
    "no window": (
        {"model_type": "qwen3", "layer_types": ["sliding_attention"] * 3},
        "sliding_window is null",
    ),
    "mistral list": (
        {"model_type": "mistral", "layer_types": ["full_attention"] * 3},
        "contradicts sliding_window 4096",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_named(case: str) -> None:
    values, message = REFUSED[case]
    with pytest.raises(ModelError, match=message):
        DecoderSpec.from_hf({**SMALL, "model_type": "llama", **values})


def test_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: no such file"):
        DecoderSpec.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"config\.json: got list"):
        DecoderSpec.from_hf(tmp_path)
    with pytest.raises(ModelError, match="config: got int"):
        DecoderSpec.from_hf(3)
