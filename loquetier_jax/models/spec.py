"""The architecture of a decoder-only base model, one dataclass for all supported families. Imports no jax."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loquetier_jax.models import hf_config
from loquetier_jax.models.rope import Llama3Rope

GROUPS: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
"""Fused projection -> its targets, in order along the output; a group takes one GEMM and one LoRA launch."""

MODULES: dict[str, str] = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
"""Target -> its path under `model.layers.{i}.` in a HF checkpoint."""


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """Architecture of a pre-norm decoder with grouped-query attention, rotate-half rope and a gated MLP.

    Families differ only in field values. Hashable, so that it can be a static argument of jit.

    Attributes:
        model_type: The HF family: llama, qwen2, qwen3, mistral or gemma.
        hidden_size: Width D of the residual stream.
        num_hidden_layers: L.
        num_attention_heads: Query heads N.
        num_key_value_heads: Key and value heads K; divides N.
        head_dim: H, even; N * H need not be D.
        intermediate_size: Width F of the MLP.
        vocab_size: V.
        max_position_embeddings: Maximum context length, tokens.
        rms_norm_eps: Epsilon of every RMSNorm.
        hidden_act: Activation of the gate, a key of `pallas_kernels.common.activation.ACTIVATIONS`.
        attention_bias: Whether q, k and v have a bias.
        o_bias: Whether o has a bias.
        mlp_bias: Whether gate, up and down have a bias.
        qk_norm: Whether RMSNorm over head_dim is applied to q and k before rope (Qwen3).
        norm_plus_one: Whether RMSNorm multiplies by 1 + w (Gemma).
        embedding_scale: Whether embeddings are multiplied by sqrt(D), rounded to the weight dtype (Gemma).
        tie_word_embeddings: Whether the output head is the transposed embedding.
        rope_theta: Base of the rope frequencies.
        rope_scaling: Llama 3.1's frequency scaling, or None.
        sliding_window: Per layer, w (a query at p sees keys t with p - w < t <= p) or None for full attention.
        eos_token_ids: End-of-sequence tokens; for a folder, from both config.json and generation_config.json.
        bos_token_id: Beginning-of-sequence token, or None.
        pad_token_id: Padding token, or None.
        dtype: Dtype of the checkpoint's weights according to the config ("bfloat16", ...), or None.
    """

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_plus_one: bool = False
    embedding_scale: bool = False
    tie_word_embeddings: bool = False
    rope_theta: float = 10_000.0
    rope_scaling: Llama3Rope | None = None
    sliding_window: tuple[int | None, ...]
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    dtype: str | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any] | str | os.PathLike[str] | Any) -> "DecoderSpec":
        """Reads a HF config, in the format of Hub files or of transformers 5.

        Args:
            config: A `config.json` as a dict or a path, a `PretrainedConfig`, or a model folder, whose
                `generation_config.json` may add to `eos_token_id`.

        Raises:
            ModelError: an unsupported architecture or feature, or a missing or invalid value; names the key.
        """
        return cls(**hf_config.read_config(config))

    @property
    def q_size(self) -> int:
        """Columns of q in the fused qkv projection: N * H."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of k and of v: K * H."""
        return self.num_key_value_heads * self.head_dim

    @property
    def group_shapes(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Group -> (in_features, out_features of each of its targets in order)."""
        d, f, q, kv = self.hidden_size, self.intermediate_size, self.q_size, self.kv_size
        return {
            "qkv_proj": (d, (q, kv, kv)),
            "o_proj": (q, (d,)),
            "gate_up_proj": (d, (f, f)),
            "down_proj": (f, (d,)),
        }

    @property
    def target_shapes(self) -> dict[str, tuple[int, int]]:
        """Target -> (in_features, out_features)."""
        shapes = self.group_shapes
        return {
            target: (shapes[group][0], out)
            for group, targets in GROUPS.items()
            for target, out in zip(targets, shapes[group][1], strict=True)
        }

    def has_bias(self, group: str) -> bool:
        """Whether the projections of a group have a bias."""
        return {"qkv_proj": self.attention_bias, "o_proj": self.o_bias}.get(group, self.mlp_bias)
