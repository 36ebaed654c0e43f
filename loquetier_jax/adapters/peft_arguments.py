"""Arguments of PEFT's `LoraConfig` that are not fields of ours."""

from loquetier_jax.borrowed import Rule, absent, anything, only, spelled

_FROZEN = "only LoRA's A and B are trained; the base is frozen"
_PLAIN = "only plain LoRA is trained"

PEFT_ARGUMENTS: dict[str, Rule] = {
    # Alternative spellings of a default.
    "rank_pattern": spelled("rank_pattern", {None: {}}),
    "alpha_pattern": spelled("alpha_pattern", {None: {}}),
    # Properties that every adapter here has.
    "peft_type": only(None, "LORA", why=_PLAIN),
    "task_type": only(None, "CAUSAL_LM", why="every base here is a causal language model"),
    "bias": only("none", why=_FROZEN),
    "inference_mode": only(False, why="a trained adapter is served with Engine.load_adapter"),
    "fan_in_fan_out": only(False, why="no base here stores its weights transposed"),
    "layers_pattern": only(None, "layers", ["layers"], why="every base here names its list of layers so"),
    # Provenance, and settings of features that must themselves be off.
    **dict.fromkeys(
        ("base_model_name_or_path", "revision", "peft_version", "auto_mapping", "runtime_config", "megatron_core",
         "qalora_group_size"),
        anything,
    ),
    # Features that train or modify something else.
    **dict.fromkeys(("modules_to_save", "trainable_token_indices", "target_parameters"), absent(_FROZEN)),
    **dict.fromkeys(("lora_bias", "ensure_weight_tying", "layer_replication"), absent(_FROZEN)),
    **dict.fromkeys(
        ("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "velora_config",
         "monteclora_config", "kasa_config", "megatron_config"),
        absent(_PLAIN),
    ),
    **dict.fromkeys(
        ("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        absent('A starts as init_lora_weights says: true or "gaussian"'),
    ),
}  # fmt: skip
