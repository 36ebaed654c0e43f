"""The reference implementation: whole sequences, dense causal attention, no cache. Differentiable and slow."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from loquetier_jax.models import decoder
from loquetier_jax.models.spec import GROUPS, DecoderSpec

Lora = Mapping[tuple[int, str], tuple[Array, Array, float | Array]]
"""(layer, target) -> (A [r, in], B [out, r], scaling), in PEFT's layout; missing modules have no delta."""


def forward(
    spec: DecoderSpec, params: decoder.Params, tokens: Int[Array, "B T"], lora: Lora | None = None
) -> Float[Array, "B T V"]:
    """Logits (f32) of B sequences of T tokens at positions 0..T-1.

    Args:
        spec: Architecture.
        params: Parameters; their dtype is the compute dtype.
        tokens: Token ids in [0, V). Padding goes at the end, where causal attention ignores it.
        lora: One adapter for all rows, or None. Differentiable, like params.
    """
    batch, length = tokens.shape
    rope = decoder.rope_tables(spec, jnp.tile(jnp.arange(length, dtype=jnp.int32), batch))
    x = decoder.embed(spec, params, tokens.reshape(-1))
    for index, weights in enumerate(params["layers"]):
        ops = DenseOps(spec, weights, index, batch, lora or {})
        x = decoder.layer(spec, weights, x, rope, ops)
    logits = decoder.logits(spec, params, decoder.final_norm(spec, params, x))
    return logits.reshape(batch, length, -1)


class DenseOps:
    """The operations of one layer on the rows of B concatenated whole sequences."""

    def __init__(
        self, spec: DecoderSpec, weights: decoder.LayerWeights, index: int, batch: int, lora: Lora
    ) -> None:
        self.spec, self.weights, self.index, self.batch, self.lora = spec, weights, index, batch, lora

    def linear(self, group: str, h: Float[Array, "T in"]) -> Float[Array, "T out"]:
        """Base projection plus the adapter's delta of each target."""
        y = self.weights[group].dot(h)
        if not any((self.index, target) in self.lora for target in GROUPS[group]):
            return y
        widths = self.spec.group_shapes[group][1]
        parts = [self._delta(t, h, width) for t, width in zip(GROUPS[group], widths, strict=True)]
        return y + jnp.concatenate(parts, axis=-1)

    def mlp(self, h: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """The gated MLP, unfused."""
        return self.linear("down_proj", decoder.gated(self.spec, self.linear("gate_up_proj", h)))

    def _delta(self, target: str, h: Float[Array, "T in"], width: int) -> Float[Array, "T width"]:
        if (self.index, target) not in self.lora:
            return jnp.zeros((h.shape[0], width), h.dtype)
        a, b, scaling = self.lora[self.index, target]
        shrunk = h @ a.astype(h.dtype).T
        return shrunk @ (b * jnp.asarray(scaling, b.dtype)).astype(h.dtype).T

    def attend(
        self, q: Float[Array, "T N H"], k: Float[Array, "T K H"], v: Float[Array, "T K H"]
    ) -> Float[Array, "T NH"]:
        """Causal attention inside each sequence; see `causal_attention`."""
        q, k, v = (a.reshape(self.batch, -1, *a.shape[1:]) for a in (q, k, v))
        mixed = causal_attention(q, k, v, window=self.spec.sliding_window[self.index])
        return mixed.reshape(-1, self.spec.q_size)


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v over keys t <= p, and t > p - window if given; scores and softmax in f32."""
    batch, length, heads, dim = q.shape
    q = q.reshape(batch, length, k.shape[2], -1, dim)  # group query heads by the key head they share
    scores = jnp.einsum("bpkgh,btkh->bkgpt", q, k, preferred_element_type=jnp.float32) * dim**-0.5
    distance = jnp.arange(length)[:, None] - jnp.arange(length)[None]
    seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    weights = jax.nn.softmax(jnp.where(seen[None, None, None], scores, -jnp.inf), axis=-1)
    mixed = jnp.einsum("bkgpt,btkh->bpkgh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return mixed.astype(v.dtype).reshape(batch, length, heads, dim)
