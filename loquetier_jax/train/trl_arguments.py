"""Arguments of transformers' `TrainingArguments` and TRL's `SFTConfig` that are not fields of our `TrainConfig`."""

from collections.abc import Mapping
from typing import Any

from loquetier_jax.borrowed import Instead, Rule, absent, anything, only, spelled
from loquetier_jax.config import is_number

_HUB = "JobHandle.save writes the adapter as a folder"
_ONE_DEVICE = "a job trains on the one device of its engine"
_OPTIMIZERS = {  # other libraries' implementations of the same algorithm
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "paged_adamw",
                     "paged_adamw_32bit", "adamw_bnb_32bit", "adamw_torch_xla", "adamw_torch_npu_fused"), "adamw"),
    **dict.fromkeys(("lion_32bit", "paged_lion", "paged_lion_32bit"), "lion"),
}  # fmt: skip

# Ignored: they only affect speed, memory, logging or workers.
_WITHOUT_EFFECT = (
    "accelerator_config", "activation_checkpointing", "activation_checkpointing_kwargs", "activation_offloading",
    "average_tokens_across_devices", "batch_eval_metrics", "chars_per_token", "dataloader_in_order",
    "dataloader_multiprocessing_context", "dataloader_num_workers", "dataloader_persistent_workers",
    "dataloader_pin_memory", "dataloader_prefetch_factor", "dataset_batch_size", "dataset_num_proc", "ddp_backend",
    "ddp_broadcast_buffers", "ddp_bucket_cap_mb", "ddp_find_unused_parameters", "ddp_static_graph", "ddp_timeout",
    "disable_tqdm", "do_eval", "do_train", "eval_accumulation_steps", "eval_do_concat_batches",
    "eval_use_gather_object", "fp16_backend", "fp16_opt_level", "full_determinism", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "half_precision_backend", "hub_always_push", "hub_strategy",
    "include_num_input_tokens_seen", "include_tokens_per_second", "label_names", "length_column_name",
    "liger_kernel_config", "local_rank", "log_level", "log_level_replica", "log_on_each_node", "logging_dir",
    "logging_nan_inf_filter", "num_of_sequences", "pad_to_multiple_of", "pad_token", "padding_free",
    "packing_strategy", "per_device_eval_batch_size", "prediction_loss_only", "project", "ray_scope",
    "remove_unused_columns", "restore_callback_states_from_checkpoint", "run_name", "save_on_each_node",
    "save_safetensors", "skip_memory_metrics", "torch_compile", "torch_compile_backend", "torch_compile_mode",
    "torch_empty_cache_steps", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id", "use_cache",
    "use_liger_kernel",
)  # fmt: skip


def _warmup_ratio(value: Any, given: Mapping[str, Any]) -> dict[str, Any] | str:
    if not (is_number(value) and 0 <= value < 1):
        return "a share of all steps in [0, 1); warmup_steps takes a number of steps"
    if not value:
        return {}
    steps = given.get("warmup_steps")  # 0 is transformers' default, which the ratio overrides
    return (Instead if is_number(steps) and steps == 0 else dict)(warmup_steps=value)


def _strategy(field: str) -> Rule:
    """Rule for eval_strategy and similar: here, only a number of steps decides."""

    def rule(value: Any, given: Mapping[str, Any]) -> dict[str, Any] | str:
        steps = given.get(field, 0)
        expected = "steps" if steps else "no"
        return {} if value == expected else f"{expected!r} with {field}={steps!r}: {field} alone says when"

    return rule


def _data_seed(value: Any, given: Mapping[str, Any]) -> dict[str, Any] | str:
    return {} if value is None or value == given.get("seed", 42) else "none: seed is the one of shuffling, too"


def _logging_first_step(value: Any, given: Mapping[str, Any]) -> dict[str, Any] | str:
    return {} if value is False or given.get("logging_steps", 1) == 1 else "false: logging_steps alone says when"


def _assistant_only(value: Any, given: Mapping[str, Any]) -> dict[str, Any] | str:
    learns_answers = given.get("completion_only_loss", True)
    return {} if value is learns_answers else f"{learns_answers}: completion_only_loss is for messages, too"


TRL_ARGUMENTS: dict[str, Rule] = {
    # Other names of fields, and other spellings of values.
    "optim": spelled("optim", _OPTIMIZERS),
    "eval_steps": spelled("eval_steps", {None: 0}),
    "completion_only_loss": spelled("completion_only_loss", {None: True}),
    "warmup_ratio": _warmup_ratio,
    "max_seq_length": spelled("max_length"),
    "truncation_mode": spelled(
        "truncation", {"keep_start": "right", "keep_end": "left"}, rest="keep_start or keep_end; truncation knows more"
    ),
    "train_sampling_strategy": spelled(
        "shuffle", {"random": True, "sequential": False}, rest="random or sequential: packs leave no padding to save"
    ),
    "data_seed": _data_seed,
    # When something happens.
    "eval_strategy": _strategy("eval_steps"),
    "evaluation_strategy": _strategy("eval_steps"),
    "save_strategy": _strategy("save_steps"),
    "logging_strategy": only("steps", why="logging_steps alone says when"),
    "logging_first_step": _logging_first_step,
    "eval_on_start": only(False, why="a job is evaluated every eval_steps, and at its end"),
    "eval_delay": only(0, 0.0, None, why="a job is evaluated every eval_steps, and at its end"),
    "metric_for_best_model": only(None, "loss", "eval_loss", why="the evaluation loss decides"),
    "greater_is_better": only(None, False, why="the evaluation loss decides"),
    # What is trained on, and how.
    "assistant_only_loss": _assistant_only,
    "packing": only(False, why="samples always share packs without seeing each other, and batch sizes count samples"),
    "eval_packing": only(None, False, why="samples always share packs without seeing each other"),
    "group_by_length": only(False, why="packs leave no padding to save"),
    "dataset_text_field": only("text", why="rename the column"),
    "dataset_kwargs": absent("pass records, or a Dataset of your own"),
    "shuffle_dataset": only(False, why="shuffle gives each pass its own order"),
    "dataloader_drop_last": only(False, why="the last step of a pass takes the samples that are left"),
    "chat_template_path": only(None, why="the template belongs in the model's folder"),
    "eos_token": only(None, why="the end token is the tokenizer's"),
    "loss_type": only("nll", None, why="loss takes a function"),
    "label_smoothing_factor": only(0, 0.0, why="loss takes a function"),
    "neftune_noise_alpha": only(None, 0, 0.0, why="noise on embeddings is not built; lora_dropout is"),
    "lr_scheduler_kwargs": absent("lr_scheduler_type and warmup_steps say all"),
    "optim_args": absent("adam_beta1, adam_beta2, adam_epsilon and momentum say all"),
    "optim_target_modules": absent("LoraConfig.target_modules says what is trained"),
    "include_for_metrics": absent("the metrics are loss and mean_token_accuracy"),
    "auto_find_batch_size": only(False, why="packs take the memory, not batches: see pack_tokens"),
    "model_init_kwargs": absent("the base is loaded by Engine.from_pretrained"),
    # Where and in what it computes.
    "bf16_full_eval": only(False, why="evaluation computes in the engine's dtype"),
    "fp16_full_eval": only(False, why="evaluation computes in the engine's dtype"),
    "tf32": only(None, False, why="jax_default_matmul_precision is jax's own setting"),
    "use_cpu": only(False, why="JAX_PLATFORMS=cpu in the environment chooses it"),
    "no_cuda": only(False, why="JAX_PLATFORMS=cpu in the environment chooses it"),
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "parallelism_config"), absent(_ONE_DEVICE)),
    "debug": absent("logging.getLogger('loquetier_jax') tells"),
    # Where results go.
    "overwrite_output_dir": only(False, why="a run goes to a folder of its own"),
    "report_to": only(None, "none", [], ["none"], why="metrics.jsonl in output_dir holds every number"),
    **dict.fromkeys(("push_to_hub", "hub_token", "hub_model_id", "hub_private_repo", "hub_revision"), absent(_HUB)),
    "save_only_model": only(False, why="a checkpoint holds the whole job; JobHandle.save writes the adapter alone"),
    "enable_jit_checkpoint": only(False, why="save_steps says when"),
    "do_predict": only(False, why="Engine.generate does"),
    "resume_from_checkpoint": only(None, False, why="use Engine.resume_job to continue from a checkpoint"),
    "ignore_data_skip": only(False, why="a resumed job always continues at its position in the data"),
    **dict.fromkeys(_WITHOUT_EFFECT, anything),
}  # fmt: skip
