"""The one definition of the decoder: pure functions over rows, shared by forward, replay and reference.

Dims: T rows (token positions), D hidden_size, N query heads, K key/value heads, H head_dim,
F intermediate_size, V vocab_size. Parameters are the nested dict described by `parameters.param_shapes`.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from loquetier_jax.models.linear import Linear, Transposed
from loquetier_jax.models.rope import inverse_frequencies
from loquetier_jax.models.spec import DecoderSpec
from pallas_kernels.common import activation

Params = Mapping[str, Any]
LayerWeights = Mapping[str, Array | Linear]
Rope = tuple[Float[Array, "T half"], Float[Array, "T half"]]


class LayerOps(Protocol):
    """The expensive operations of one layer, bound to its weights; implementations may keep or replay activations."""

    def linear(self, group: str, h: Float[Array, "T in"]) -> Float[Array, "T out"]:
        """Base GEMM + bias + LoRA of a fused group (a key of `spec.GROUPS`)."""

    def attend(
        self, q: Float[Array, "T N H"], k: Float[Array, "T K H"], v: Float[Array, "T K H"]
    ) -> Float[Array, "T NH"]:
        """Attention with scale H^-0.5 and this layer's window; q and k are already rotated."""

    def mlp(self, h: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """The gated MLP of the normed rows: `down_proj(gated(gate_up_proj(h)))`."""


def embed(spec: DecoderSpec, params: Params, tokens: Int[Array, " T"]) -> Float[Array, "T D"]:
    """Embeddings of tokens in [0, V), in the dtype of the table."""
    table = params["embed_tokens"]
    x = table[tokens]
    # HF rounds sqrt(D) to the weight dtype first (GemmaTextScaledWordEmbedding), which matters in bf16.
    return x * jnp.asarray(spec.hidden_size**0.5, table.dtype) if spec.embedding_scale else x


def rope_tables(spec: DecoderSpec, positions: Int[Array, " T"]) -> Rope:
    """(cos, sin) of the rotation angles of absolute positions, f32 [T, H/2] each."""
    frequencies = inverse_frequencies(spec.head_dim, spec.rope_theta, spec.rope_scaling)
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "T heads H"], rope: Rope) -> Float[Array, "T heads H"]:
    """Rotates the pairs (x[i], x[i + H/2]) by the angles of `rope`, in f32; returns the dtype of x."""
    cos, sin = (table[:, None] for table in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def rms_norm(
    spec: DecoderSpec, x: Float[Array, "... D"], weight: Float[Array, " D"]
) -> Float[Array, "... D"]:
    """RMSNorm over the last axis, with statistics in f32.

    Rounds as HF does: cast to the dtype of x, then multiply by w; for Gemma, multiply by 1 + w in f32, then cast.
    """
    weight = jnp.expand_dims(weight, tuple(range(x.ndim - 1)))
    wide = x.astype(jnp.float32)
    variance = jnp.mean(wide * wide, axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(variance + np.float32(spec.rms_norm_eps))
    if spec.norm_plus_one:
        return (normed * (1.0 + weight.astype(jnp.float32))).astype(x.dtype)
    return normed.astype(x.dtype) * weight


def layer(
    spec: DecoderSpec, w: LayerWeights, x: Float[Array, "T D"], rope: Rope, ops: LayerOps
) -> Float[Array, "T D"]:
    """One decoder layer on T rows; everything expensive goes through `ops`.

    Args:
        spec: Architecture.
        w: Weights of this layer; only the norms are read here.
        x: Residual stream.
        rope: `rope_tables` of the rows.
        ops: The projections, attention and MLP of this layer.

    Returns:
        The residual stream after attention and MLP, in the dtype of x.
    """
    qkv = ops.linear("qkv_proj", rms_norm(spec, x, w["input_layernorm"]))
    qkv = qkv.reshape(x.shape[0], -1, spec.head_dim)
    q, k, v = jnp.split(qkv, np.cumsum([spec.num_attention_heads, spec.num_key_value_heads]), axis=1)
    if spec.qk_norm:
        q, k = rms_norm(spec, q, w["q_norm"]), rms_norm(spec, k, w["k_norm"])
    x = x + ops.linear("o_proj", ops.attend(rotate(q, rope), rotate(k, rope), v))
    return x + ops.mlp(rms_norm(spec, x, w["post_attention_layernorm"]))


def gated(spec: DecoderSpec, gate_up: Float[Array, "T FF"]) -> Float[Array, "T F"]:
    """act(gate) * up of the two halves of `gate_up`, in its dtype, as defined by `smlm_glu`."""
    return activation.gated(spec.hidden_act, gate_up)


def final_norm(spec: DecoderSpec, params: Params, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
    """The norm after the last layer."""
    return rms_norm(spec, x, params["norm"])


def head(spec: DecoderSpec, params: Params) -> Linear:
    """The matrix from hidden states to logits: lm_head, or the transposed embedding if tied."""
    return Transposed(params["embed_tokens"]) if spec.tie_word_embeddings else params["lm_head"]


def logits(spec: DecoderSpec, params: Params, x: Float[Array, "T D"]) -> Float[Array, "T V"]:
    """f32 logits of rows after `final_norm`; accumulated in f32 and never rounded."""
    return head(spec, params).dot(x, jnp.float32)


def logits_transpose(spec: DecoderSpec, params: Params, dlogits: Float[Array, "T V"]) -> Float[Array, "T D"]:
    """d loss / d x of `logits`: its transpose, with operands in the compute dtype.

    Autodiff would instead keep the cotangent in f32 and convert the whole vocabulary matrix to f32.
    """
    dtype = params["norm"].dtype
    return head(spec, params).dot_transpose(dlogits.astype(dtype), jnp.float32).astype(dtype)
