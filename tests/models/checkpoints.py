"""Tiny random checkpoints of every family, written by transformers: the truth of the parity tests."""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from loquetier_jax.models.parameters import param_table
from loquetier_jax.models.spec import DecoderSpec

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# The pretraining length is so short that all three ranges of wavelengths occur among 4 frequencies.
_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": _LLAMA3_ROPE, "rms_norm_eps": 1e-5}),
    "llama_tied": ("Llama", {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "gemma": ("Gemma", {"head_dim": 16, "num_key_value_heads": 1}),
}
"""Name -> (prefix of the transformers classes, config values beside the common ones)."""


def tiny_checkpoint(family: str, folder: str | os.PathLike[str], **overrides: Any) -> Path:
    """Writes a sharded random f32 checkpoint and returns its folder.

    Args:
        family: A key of FAMILIES.
        folder: Made when absent.
        **overrides: Config values; also `seed` (0) of the weights and `dtype` (torch.float32) to write.
    """
    import torch
    import transformers

    prefix, values = FAMILIES[family]
    seed, dtype = overrides.pop("seed", 0), overrides.pop("dtype", torch.float32)
    config = getattr(transformers, f"{prefix}Config")(**{**_SIZES, **values, **overrides})
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    randomize(model, seed)
    model.to(dtype).save_pretrained(folder, max_shard_size="16KB")
    return Path(folder)


def randomize(model: Any, seed: int) -> None:
    """Draws every parameter: logits of order one, norms and biases away from their neutral values."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    neutral = 0.0 if model.config.model_type == "gemma" else 1.0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(neutral + 0.3 * noise)
            elif weight.ndim == 1:
                weight.copy_(0.3 * noise)
            else:
                weight.copy_(noise * weight.shape[-1] ** -0.5)


def hf_model(folder: str | os.PathLike[str], **kwargs: Any) -> Any:
    """The torch model of a folder, in eval mode with plain attention."""
    import transformers

    kwargs = {"attn_implementation": "eager", **kwargs}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


def hf_logits(folder: str | os.PathLike[str], tokens: Any, **config: Any) -> Any:
    """numpy f32 logits [B, T, V] of tokens [B, T], computed by transformers in f32; `config` overrides config.json."""
    import torch

    with torch.no_grad():
        model = hf_model(folder, dtype=torch.float32, **config)
        return model(torch.as_tensor(tokens, dtype=torch.int64)).logits.numpy()


def draw_tensors(spec: DecoderSpec, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Checkpoint tensors of a spec, in torch's (out, in) layout."""
    rng = np.random.default_rng(0)
    shapes = [tensor for p in jax.tree.leaves(param_table(spec)) for tensor in p.tensors]
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes}
