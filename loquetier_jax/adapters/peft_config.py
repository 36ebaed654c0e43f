"""Converts between adapter_config.json and LoraConfig / LoraShape."""

import math
from collections import Counter
from typing import Any

from loquetier_jax.adapters.lora import LoraConfig, LoraShape
from loquetier_jax.adapters.targets import module_name, unwrapped
from loquetier_jax.errors import AdapterError, ConfigError, short
from loquetier_jax.models.spec import DecoderSpec

_HONOURED = {
    "r", "lora_alpha", "target_modules", "exclude_modules", "lora_dropout", "use_rslora", "rank_pattern",
    "alpha_pattern", "layers_to_transform", "init_lora_weights",
}
# Provenance, and settings of features that must themselves be off.
_INERT = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
    "auto_mapping", "megatron_core", "qalora_group_size", "ensure_weight_tying", "eva_config",
    # Written by ms-swift: learning rates, and the training dtype.
    "lorap_lr_ratio", "lorap_emb_lr", "lora_dtype",
}
# Initialisations that leave the base unchanged, so that A and B are the whole adapter; pissa, olora, ... modify it.
_INITS = (True, False, "gaussian", "eva", "orthogonal")


def config_from_peft(data: Any) -> LoraConfig:
    """The LoRA settings in an adapter_config.json.

    Any key that is neither supported nor inert must be empty (null, false, "none", [], {}): newer PEFT versions write
    such a key for each unused variant.

    Args:
        data: The parsed file.

    Raises:
        AdapterError: an unsupported setting or an invalid value; names the key.
    """
    if not isinstance(data, dict):
        raise AdapterError(f"got {type(data).__name__}, expected a mapping")
    if data.get("peft_type") != "LORA":
        raise AdapterError(f"peft_type: got {short(data.get('peft_type'))}, expected 'LORA'")
    if data.get("task_type") not in (None, "CAUSAL_LM"):
        raise AdapterError(f"task_type: got {short(data['task_type'])}, expected 'CAUSAL_LM'")
    for key in sorted(data.keys() - _HONOURED - _INERT):
        # Every supported base names its list of layers "layers", so naming it changes nothing.
        if not _empty(data[key]) and not (key == "layers_pattern" and data[key] in ("layers", ["layers"])):
            raise AdapterError(f"{key:.100}: got {short(data[key])}, which is not supported; leave it unset")
    # null means the default.
    fields = {key: _unwrapped(data[key]) for key in _HONOURED if data.get(key) is not None}
    init = fields.pop("init_lora_weights", True)
    if init not in _INITS:
        raise AdapterError(f"init_lora_weights: {short(init)} may change the base; expected one of {_INITS}")
    if init == "gaussian":
        fields["init_lora_weights"] = init
    try:
        return LoraConfig(**fields)
    except ConfigError as error:
        raise AdapterError(str(error)) from error


def config_to_peft(
    shape: LoraShape, spec: DecoderSpec, config: LoraConfig, base_model_name_or_path: str | None
) -> dict[str, Any]:
    """The adapter_config.json from which PEFT rebuilds `shape`; dropout and init come from `config`."""
    use_rslora, alphas = _alphas(shape)
    r = Counter(m.r for m in shape.modules).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    names = {key: module_name(m.layer, m.target) for key, m in shape.by_key.items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_dora": False,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": config.lora_dropout,
        "init_lora_weights": config.init_lora_weights,
        "use_rslora": use_rslora,
        # Always written: otherwise PEFT silently targets only q_proj and v_proj and drops the other tensors.
        "target_modules": _target_modules(shape, spec),
        # Full names, so that the order of keys does not matter.
        "rank_pattern": {names[key]: m.r for key, m in shape.by_key.items() if m.r != r},
        "alpha_pattern": {names[key]: value for key, value in alphas.items() if value != alpha},
    }


def _unwrapped(value: Any) -> Any:
    """Strips the components that wrappers add from a list of names or from the keys of a pattern."""
    if isinstance(value, list):
        return [unwrapped(name) if isinstance(name, str) else name for name in value]
    return {unwrapped(key): one for key, one in value.items()} if isinstance(value, dict) else value


def _empty(value: Any) -> bool:
    return value is None or value is False or value in ("", "none", [], {})


def _target_modules(shape: LoraShape, spec: DecoderSpec) -> list[str]:
    layers = Counter(m.target for m in shape.modules)
    whole = {target for target, count in layers.items() if count == spec.num_hidden_layers}
    return sorted(whole | {module_name(m.layer, m.target) for m in shape.modules if m.target not in whole})


def _alphas(shape: LoraShape) -> tuple[bool, dict[str, float]]:
    """(use_rslora, {key: lora_alpha}) that reproduce the scalings, bit for bit where that is possible."""
    forms = []
    for use_rslora in (False, True):
        found = [_alpha(m.scaling, math.sqrt(m.r) if use_rslora else m.r) for m in shape.modules]
        inexact = sum(not exact for _, exact in found)
        fractions = sum(not isinstance(alpha, int) for alpha, _ in found)
        alphas = dict(zip(shape.by_key, (alpha for alpha, _ in found), strict=True))
        forms.append((inexact, fractions, use_rslora, alphas))
    _, _, use_rslora, alphas = min(forms, key=lambda form: form[:3])
    return use_rslora, alphas


def _alpha(scaling: float, divisor: float) -> tuple[float, bool]:
    """(the roundest alpha that gives the scaling, usually what the user set; whether it does so exactly)."""
    product = scaling * divisor
    for alpha in (*(round(product, digits) for digits in range(16)), product):
        if alpha / divisor == scaling:
            return (int(alpha) if alpha == int(alpha) else alpha), True
    return product, False
