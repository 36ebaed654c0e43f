"""Reads `config.json` and `generation_config.json` of a HF folder. Imports neither jax nor transformers."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loquetier_jax.errors import ModelError
from loquetier_jax.models.rope import read_rope

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "gemma": "GemmaForCausalLM",
}

# Defaults of transformers' config classes for keys that a file may omit.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    "mistral": {"max_position_embeddings": 131072, "sliding_window": 4096, "num_key_value_heads": 8},
    "gemma": {
        "max_position_embeddings": 8192,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "tie_word_embeddings": True,
    },
}

# Keys that change a model's computation; values other than these are refused.
_INERT: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "n_routed_experts": (None, 0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "use_bidirectional_attention": (None, False),
    "is_encoder_decoder": (None, False),
}

_MOST_LAYERS = 10_000

_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu",
    "gelu_new": "gelu_pytorch_tanh", "gelu_pytorch_tanh": "gelu_pytorch_tanh",
}  # fmt: skip


def read_config(config: Mapping[str, Any] | str | os.PathLike[str] | Any) -> dict[str, Any]:
    """Returns the fields of `DecoderSpec`; see `DecoderSpec.from_hf`.

    Raises:
        ModelError: an unsupported architecture or feature, or a missing or invalid value; names the key.
    """
    config = _as_dict(config)
    model_type = _check_supported(config)
    config = {**_DEFAULTS[model_type], **config}
    layers, hidden = _integer(config, "num_hidden_layers"), _integer(config, "hidden_size")
    if layers > _MOST_LAYERS:  # every layer is listed before the weights are looked at
        raise ModelError(f"num_hidden_layers: got {layers}, expected at most {_MOST_LAYERS}")
    length = _integer(config, "max_position_embeddings")
    theta, scaling = read_rope(config, length)
    attention_bias = model_type != "mistral" and bool(config.get("attention_bias"))
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        **_heads(config, hidden),
        "intermediate_size": _integer(config, "intermediate_size"),
        "vocab_size": _integer(config, "vocab_size"),
        "max_position_embeddings": length,
        "rms_norm_eps": _epsilon(config),
        "hidden_act": _activation(config, model_type),
        "attention_bias": attention_bias or model_type == "qwen2",
        "o_bias": attention_bias and model_type != "qwen2",
        "mlp_bias": model_type == "llama" and bool(config.get("mlp_bias")),
        "qk_norm": model_type == "qwen3",
        "norm_plus_one": model_type == "gemma",
        "embedding_scale": model_type == "gemma",
        "tie_word_embeddings": bool(config.get("tie_word_embeddings")),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "sliding_window": _windows(config, model_type, layers),
        "eos_token_ids": _token_ids(config, "eos_token_id"),
        "bos_token_id": next(iter(_token_ids(config, "bos_token_id")), None),
        "pad_token_id": next(iter(_token_ids(config, "pad_token_id")), None),
        "dtype": _dtype_name(config),
    }


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ModelError: the file is missing, not JSON, or not an object; names the path.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error})") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path}: got {type(data).__name__}, expected a JSON object")
    return data


def _as_dict(config: Any) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    if hasattr(config, "to_dict"):
        return dict(config.to_dict())
    if not isinstance(config, (str, os.PathLike)):
        raise ModelError(f"config: got {type(config).__name__}, expected dict, PretrainedConfig or path")
    path = Path(config)
    if not path.is_dir():
        return read_json(path)
    data = read_json(path / "config.json")
    generation = path / "generation_config.json"
    if not generation.exists():
        return data
    # The files may disagree (a base's config next to its chat model's generation config): take the union.
    ends = (*_token_ids(data, "eos_token_id"), *_token_ids(read_json(generation), "eos_token_id"))
    return {**data, "eos_token_id": list(ends)}


def _check_supported(config: Mapping[str, Any]) -> str:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise ModelError(f"model_type: {model_type!r} is not supported, only {sorted(ARCHITECTURES)} are")
    architectures = config.get("architectures") or ()
    if not isinstance(architectures, (list, tuple)):
        raise ModelError(f"architectures: got {architectures!r}, expected a list of names")
    for architecture in architectures:
        known = ARCHITECTURES[model_type]
        if architecture != known:
            raise ModelError(f"architectures: {architecture!r} is not supported, expected {known}")
    for key, inert in _INERT.items():
        if config.get(key) not in inert:
            raise ModelError(f"{key}: {config[key]!r} is not supported for model_type {model_type!r}")
    return model_type


def _integer(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise ModelError(f"{key}: got {value!r}, expected an integer from 1 to 2**31 - 1")
    return value


def _heads(config: Mapping[str, Any], hidden: int) -> dict[str, int]:
    heads = _integer(config, "num_attention_heads")
    kv_heads = heads if config.get("num_key_value_heads") is None else _integer(config, "num_key_value_heads")
    if heads % kv_heads:
        raise ModelError(f"num_key_value_heads: got {kv_heads}, expected a divisor of {heads} query heads")
    if config.get("head_dim") is not None:
        head_dim = _integer(config, "head_dim")
    elif hidden % heads:
        raise ModelError(f"hidden_size: got {hidden}, expected a multiple of num_attention_heads {heads}")
    else:
        head_dim = hidden // heads
    if head_dim % 2:
        raise ModelError(f"head_dim: got {head_dim}, expected an even number (rope rotates pairs)")
    return {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}


def _epsilon(config: Mapping[str, Any]) -> float:
    value = config.get("rms_norm_eps", 1e-6)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ModelError(f"rms_norm_eps: got {value!r}, expected a number in [0, 1)")
    return float(value)


def _activation(config: Mapping[str, Any], model_type: str) -> str:
    names = [config[key] for key in ("hidden_act", "hidden_activation") if config.get(key) is not None]
    names = names or ["gelu_pytorch_tanh" if model_type == "gemma" else "silu"]
    if model_type == "gemma":
        # Early Gemma files say "gelu" but mean the tanh approximation (transformers #29402).
        names = ["gelu_pytorch_tanh" if name == "gelu" else name for name in names]
    for name in names:
        if not isinstance(name, str) or name not in _ACTIVATIONS:
            raise ModelError(f"hidden_act: {name!r} is not supported, expected one of {sorted(_ACTIVATIONS)}")
    if len({_ACTIVATIONS[name] for name in names}) > 1:
        raise ModelError(f"hidden_activation: {names[1]!r} contradicts hidden_act {names[0]!r}")
    return _ACTIVATIONS[names[0]]


def _windows(config: Mapping[str, Any], model_type: str, layers: int) -> tuple[int | None, ...]:
    if model_type in ("llama", "gemma"):  # their HF classes ignore these keys
        return (None,) * layers
    used = model_type == "mistral" or bool(config.get("use_sliding_window"))
    window = _integer(config, "sliding_window") if used and config.get("sliding_window") is not None else None
    uniform = "full_attention" if window is None else "sliding_attention"
    types = config.get("layer_types")
    if types is None and model_type == "mistral":
        types = [uniform] * layers
    elif types is None:
        start = layers if window is None else _start_of_windows(config)
        types = ["sliding_attention" if i >= start else "full_attention" for i in range(layers)]
    if not isinstance(types, (list, tuple)) or len(types) != layers:
        raise ModelError(f"layer_types: got {types!r}, expected a list of num_hidden_layers = {layers} names")
    for name in types:
        if name not in ("full_attention", "sliding_attention"):
            raise ModelError(f"layer_types: {name!r} is neither full_attention nor sliding_attention")
        if name == "sliding_attention" and window is None:
            raise ModelError("layer_types: has sliding_attention, but sliding_window is null or not used")
        if model_type == "mistral" and name != uniform:  # transformers' Mistral ignores the list
            raise ModelError(f"layer_types: {name!r} contradicts sliding_window {window} of a mistral model")
    return tuple(window if name == "sliding_attention" else None for name in types)


def _start_of_windows(config: Mapping[str, Any]) -> int:
    value = config.get("max_window_layers", 28)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ModelError(f"max_window_layers: got {value!r}, expected an integer >= 0")
    return value


def _token_ids(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = config.get(key)
    ids = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise ModelError(f"{key}: got {value!r}, expected a token id, a list of them or null")
    return tuple(dict.fromkeys(ids))


def _dtype_name(config: Mapping[str, Any]) -> str | None:
    value = config.get("dtype") or config.get("torch_dtype")
    return None if value is None else str(value).removeprefix("torch.")
