"""Writes parameters as an ordinary Hugging Face folder, the inverse of `models.load`; Llama family only."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from loquetier_jax.models.spec import GROUPS, MODULES, DecoderSpec
from loquetier_jax.tiny import tokenizer


def to_hf(spec: DecoderSpec, params: dict[str, Any], dtype: Any = jnp.bfloat16) -> dict[str, np.ndarray]:
    """Tensors under Hugging Face names, in torch's (out, in) layout.

    Args:
        spec: A Llama architecture: no biases, no qk-norm.
        params: Parameters as used by `models.decoder`.
        dtype: Dtype of the tensors.
    """
    params = jax.tree.map(lambda x: np.asarray(x.astype(dtype)), params)
    tensors = {"model.embed_tokens.weight": params["embed_tokens"], "model.norm.weight": params["norm"]}
    if not spec.tie_word_embeddings:
        tensors["lm_head.weight"] = params["lm_head"].w.T
    for i, layer in enumerate(params["layers"]):
        prefix = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = layer[norm]
        for group, targets in GROUPS.items():
            cuts = np.cumsum(spec.group_shapes[group][1])[:-1]
            for target, weight in zip(targets, np.split(layer[group].w, cuts, axis=1), strict=True):
                tensors[f"{prefix}{MODULES[target]}.weight"] = weight.T
    # safetensors writes the raw buffer, so a transposed view would be saved untransposed.
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def save_base(folder: str | Path, config: dict[str, Any], spec: DecoderSpec, params: dict[str, Any]) -> None:
    """Writes config, generation config, tokenizer and bf16 weights to `folder`, creating it if missing."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    generation = {
        "bos_token_id": tokenizer.BOS,
        "eos_token_id": [tokenizer.EOS, tokenizer.END],
        "pad_token_id": tokenizer.PAD,
    }
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save_tokenizer(folder)
    save_file(to_hf(spec, params), folder / "model.safetensors", metadata={"format": "pt"})
