"""A layer's expensive operations in the forward: computed for all rows, with train rows' results kept.

`models.decoder.layer` is the one definition of a layer; it reaches GEMMs, adapters and attention only through an
`ops` object: `ForwardOps` here, or `replay.ReplayOps` in the backward.
"""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from loquetier_jax.adapters.pages import LoraPages
from loquetier_jax.batch.rows import PackRows, SegmentBatch
from loquetier_jax.config import BLOCK, Bucket, EngineConfig
from loquetier_jax.models.decoder import LayerWeights
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.step.dropout import dropout
from loquetier_jax.step.kv_cache import KVCache
from pallas_kernels import SmlmPlan, pack_attention, paged_attention, smlm_fwd, smlm_glu


def attend_packs(
    spec: DecoderSpec,
    cfg: EngineConfig,
    layer: int,
    rows: PackRows,
    tokens: int,
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
) -> Float[Array, "T NH"]:
    """Causal attention inside packs of `tokens` rows."""

    def packs(a: jax.Array) -> jax.Array:
        return a.reshape(-1, tokens, *a.shape[1:])

    out = pack_attention(
        packs(q),
        packs(k),
        packs(v),
        packs(rows.positions),
        packs(rows.segments),
        scale=spec.head_dim**-0.5,
        window=spec.sliding_window[layer],
        implementation=cfg.train_attention,
    )
    return out.reshape(q.shape[0], -1)


def shrunk(group: str) -> str:
    """The key under which a group's S = x A^T is kept: [train rows, targets, max_lora_pages, 16]."""
    return f"{group}.S"


def lora_plan(batch: SegmentBatch, bucket: Bucket) -> SmlmPlan:
    """The SMLM plan of a step, including the packs whose S is kept."""
    if batch.train is None:
        return batch.lora
    return replace(batch.lora, pack_pages=batch.train.pages, pack_rows=bucket.pack_tokens)


@dataclass
class ForwardOps:
    """Computes one layer's operations for all rows of a batch.

    Attributes:
        weights, pages: The layer's base weights and adapter pages.
        kv: The layer's KV cache; replaced when written.
        plan: `lora_plan` of the batch; replaced after every use, see `smlm_fwd`.
        kept: Collects the train rows of every result named in `cfg.keep`, and every group's S.
        use_dropout: Whether train rows have LoRA dropout in this compile.
    """

    spec: DecoderSpec
    cfg: EngineConfig
    bucket: Bucket
    layer: int
    weights: LayerWeights
    pages: dict[str, LoraPages]
    kv: KVCache | None
    batch: SegmentBatch
    plan: SmlmPlan
    use_dropout: bool = False
    kept: dict[str, jax.Array] = field(default_factory=dict)

    def keep(self, name: str, y: Float[Array, "T out"]) -> Float[Array, "T out"]:
        if name in self.cfg.keep and self.bucket.packs:
            self.kept[name] = y[: self.bucket.train_rows]
        return y

    def keep_S(self, group: str, S: Float[Array, "rows n MP R"] | None) -> None:
        if S is not None:
            self.kept[shrunk(group)] = S

    def lora_input(self, group: str, h: Float[Array, "T in"]) -> Float[Array, "T in"]:
        """h, with LoRA dropout applied to its train rows."""
        train, rows = self.batch.train, self.bucket.train_rows
        if not self.use_dropout or train is None:
            return h
        rates = jnp.repeat(train.drop_rates, self.bucket.pack_tokens)
        dropped = dropout(h[:rows], train.drop_keys, rates, jnp.int32(self.layer), group)
        return jnp.concatenate([dropped, h[rows:]])

    def linear(self, group: str, h: Float[Array, "T in"]) -> Float[Array, "T out"]:
        """Base projection of all rows plus every row's LoRA delta."""
        y, x, lora = self.weights[group].dot(h), self.lora_input(group, h), self.pages[group]
        outs = self.spec.group_shapes[group][1]
        y, S, self.plan = smlm_fwd(
            x, lora.A, lora.B, self.plan, out_features=outs, y=y, implementation=self.cfg.smlm
        )
        self.keep_S(group, S)
        return self.keep(group, y)

    def mlp(self, h: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """The gated MLP of all rows, including LoRA deltas."""
        group = "gate_up_proj"
        y, x, lora = self.weights[group].dot(h), self.lora_input(group, h), self.pages[group]
        out, gate_up, S, self.plan = smlm_glu(
            x,
            lora.A,
            lora.B,
            self.plan,
            y=y,
            activation=self.spec.hidden_act,
            keep=group in self.cfg.keep,
            implementation=self.cfg.smlm,
        )
        self.keep_S(group, S)
        if gate_up is not None:
            self.kept[group] = gate_up
        return self.linear("down_proj", out)

    def attend(
        self, q: Float[Array, "T N H"], k: Float[Array, "T K H"], v: Float[Array, "T K H"]
    ) -> Float[Array, "T NH"]:
        """Packs attend within themselves; prefill and decode rows write the KV cache, then read it."""
        b, bucket, parts, at = self.batch, self.bucket, [], 0
        for rows, count, tokens in (
            (b.train.rows if b.train else None, bucket.train_rows, bucket.pack_tokens),
            (b.score, bucket.score_rows, bucket.score_tokens),
        ):
            if rows is not None:
                cut = slice(at, at + count)
                parts.append(
                    attend_packs(self.spec, self.cfg, self.layer, rows, tokens, q[cut], k[cut], v[cut])
                )
                at += count
        if b.prefill is not None or b.decode is not None:
            parts += self._attend_cache(q[at:], k[at:], v[at:])
        return self.keep("attention", jnp.concatenate(parts) if len(parts) > 1 else parts[0])

    def _attend_cache(self, q: jax.Array, k: jax.Array, v: jax.Array) -> list[jax.Array]:
        served = [rows for rows in (self.batch.prefill, self.batch.decode) if rows is not None]
        page = jnp.concatenate([rows.kv_page for rows in served])
        offset = jnp.concatenate([rows.kv_offset for rows in served])
        self.kv = self.kv.write(page, offset, k, v)
        outs, at = [], 0
        for rows, block in ((self.batch.prefill, BLOCK), (self.batch.decode, 1)):
            if rows is not None:
                size = rows.positions.shape[0]
                out = paged_attention(
                    q[at : at + size],
                    self.kv.k,
                    self.kv.v,
                    rows.plan,
                    block_rows=block,
                    scale=self.spec.head_dim**-0.5,
                    window=self.spec.sliding_window[self.layer],
                    implementation=self.cfg.attention,
                )
                outs.append(out.reshape(size, -1))
                at += size
        return outs
