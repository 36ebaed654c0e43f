"""The unified forward: train, score, prefill and decode rows through one stack of layers, base weights read once."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from loquetier_jax.adapters.pages import AdapterPages
from loquetier_jax.batch.segments import SegmentBatch, positions_of, unravel
from loquetier_jax.config import PACK_ALIGN, Bucket, EngineConfig
from loquetier_jax.kv.cache import KVCache
from loquetier_jax.models.decoder import LayerWeights, embed, final_norm, layer, logits, rope_tables
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.step.loss import score_rows
from loquetier_jax.step.ops import ForwardOps
from loquetier_jax.step.sample import SlotState, sample

Params = dict[str, Any]
Kept = list[dict[str, jax.Array]]


@flax.struct.dataclass
class ForwardOut:
    """What one forward leaves behind, beside the donated state.

    Attributes:
        sampled: See `step.sample.sample`; {} when the bucket samples nothing.
        train: {"logp", "correct"} of the train rows, [G * L]; {} without.
        score: See `step.loss.score_rows`; {} without.
        kept: Per layer {"x": [G * L, D] its input, every group's S, the names in `cfg.keep`}; [] without train rows.
        hidden: [G * L, D] final hidden states of the train rows, before the norm; None without.
    """

    sampled: dict[str, jax.Array]
    train: dict[str, jax.Array]
    score: dict[str, jax.Array]
    kept: Kept
    hidden: jax.Array | None


def tokens_of(batch: SegmentBatch, slots: SlotState) -> jax.Array:
    """Token ids of all rows in flat order; decode rows take the slot's last token."""
    parts = [
        batch.train.rows.tokens if batch.train else None,
        batch.score.tokens if batch.score else None,
        batch.prefill.tokens if batch.prefill else None,
        slots.last_token[batch.decode.slots] if batch.decode else None,
    ]
    return jnp.concatenate([p for p in parts if p is not None])


def run_layers(
    spec: DecoderSpec,
    cfg: EngineConfig,
    bucket: Bucket,
    use_dropout: bool,
    params: Params,
    pages: AdapterPages,
    kv: list[KVCache] | None,
    batch: SegmentBatch,
    x: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    first: int = 0,
) -> tuple[jax.Array, list[KVCache], Kept]:
    """Layers first, first + 1, ... over the rows x [T, D]; `params["layers"]`, `pages` and `kv` hold just those."""
    kept, written = [], []
    for i, (w, pg) in enumerate(zip(params["layers"], pages.layers, strict=True)):
        ops = ForwardOps(spec, cfg, bucket, first + i, w, pg, kv[i] if kv else None, batch, use_dropout)
        y = layer(spec, w, x, rope, ops)
        if bucket.packs:
            kept.append(dict(ops.kept, x=x[: bucket.train_rows]))
        written.append(ops.kv)
        x = y
    return x, written, kept


def forward(
    spec: DecoderSpec,
    cfg: EngineConfig,
    bucket: Bucket,
    template: SegmentBatch,
    use_dropout: bool,
    params: Params,
    pages: AdapterPages,
    kv: list[KVCache],
    slots: SlotState,
    flat: jax.Array,
) -> tuple[list[KVCache], SlotState, ForwardOut]:
    """One step over every kind of row.

    Args:
        spec, cfg, bucket, template, use_dropout: Static: what is compiled.
        params: The frozen base; never donated, never copied.
        pages: Adapter pages, read only here.
        kv, slots: Donated; the returned ones replace them.
        flat: The batch as one int32 buffer (`batch.segments.ravel`).
    """
    batch = unravel(template, flat)
    x = embed(spec, params, tokens_of(batch, slots))
    rope = rope_tables(spec, positions_of(batch))
    x, kv, kept = run_layers(spec, cfg, bucket, use_dropout, params, pages, kv, batch, x, rope)
    t, s = bucket.train_rows, bucket.score_rows
    train, score, sampled = {}, {}, {}
    if t:
        train = score_rows(spec, params, x[:t], batch.train.rows.targets, limit=cfg.logit_chunk, top=0)
    if s:
        scored = x[t : t + s]
        score = score_rows(
            spec, params, scored, batch.score.targets, limit=cfg.logit_chunk, top=cfg.max_logprobs
        )
    if bucket.samples:
        rows = sample_rows(bucket, batch, x[t + s :])
        slots, sampled = sample(
            sample_logits(spec, params, rows),
            batch.sample,
            slots,
            level=bucket.sampling,
            max_logprobs=cfg.max_logprobs,
        )
    return (
        kv,
        slots,
        ForwardOut(sampled=sampled, train=train, score=score, kept=kept, hidden=x[:t] if t else None),
    )


def sample_rows(bucket: Bucket, batch: SegmentBatch, x: jax.Array) -> jax.Array:
    """The rows a token is drawn from: decode rows, then each chunk's last row. x [prefill + decode, D] -> [n, D]."""
    decode = x[bucket.prefill :]
    if batch.prefill is None:
        return decode
    return jnp.concatenate([decode, x[batch.prefill.last_row]])


def sample_logits(spec: DecoderSpec, params: Params, x: jax.Array) -> jax.Array:
    """f32 logits of the rows a token is drawn from, as the training forward computes them. [n, D] -> [n, V].

    Filled up to a multiple of PACK_ALIGN rows: fewer rows take another GEMM on the XLA CPU path, whose last bits differ
    from those of train and score rows.
    """
    padded = jnp.pad(x, ((0, -x.shape[0] % PACK_ALIGN), (0, 0)))
    return logits(spec, params, final_norm(spec, params, padded))[: x.shape[0]]


def forward_start(spec: DecoderSpec, template: SegmentBatch, params: Params, flat: jax.Array) -> jax.Array:
    """Embeddings of the train rows of a step that has no other rows: the start of a sliced forward. -> [T, D]."""
    batch = unravel(template, flat)
    return embed(spec, params, batch.train.rows.tokens)


def forward_slice(
    spec: DecoderSpec,
    cfg: EngineConfig,
    bucket: Bucket,
    template: SegmentBatch,
    use_dropout: bool,
    first: int,
    layers: list[LayerWeights],
    pages: AdapterPages,
    x: jax.Array,
    flat: jax.Array,
) -> tuple[jax.Array, Kept]:
    """Some layers of the train rows alone, for packs whose whole forward would overrun the latency promise."""
    batch = unravel(template, flat)
    rope = rope_tables(spec, batch.train.rows.positions)
    x, _, kept = run_layers(
        spec, cfg, bucket, use_dropout, {"layers": layers}, pages, None, batch, x, rope, first
    )
    return x, kept


def forward_end(
    spec: DecoderSpec, cfg: EngineConfig, template: SegmentBatch, head: Params, x: jax.Array, flat: jax.Array
) -> dict[str, jax.Array]:
    """Log-probs of the targets from the final hidden states: the end of a sliced forward."""
    batch = unravel(template, flat)
    return score_rows(spec, head, x, batch.train.rows.targets, limit=cfg.logit_chunk, top=0)
