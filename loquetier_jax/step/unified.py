"""The unified step: train, score, prefill and decode rows in one pass over the layers, reading base weights once."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from loquetier_jax.adapters.pages import AdapterPages
from loquetier_jax.batch.rows import SegmentBatch, empty_batch, positions_of, shapes_of, unravel
from loquetier_jax.config import Bucket, EngineConfig
from loquetier_jax.models.decoder import LayerWeights, Params, Rope, embed, layer, rope_tables
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.step.head import score_rows
from loquetier_jax.step.kv_cache import KVCache
from loquetier_jax.step.ops import ForwardOps, lora_plan

Kept = list[dict[str, Array]]
"""Per layer, for the train rows: {"x": [G * L, D], its input; every group's S; the names in `cfg.keep`}."""


@struct.dataclass
class ForwardOut:
    """The result of a forward, besides the KV cache. Hidden states are final ones, before the norm.

    Attributes:
        sample_hidden: [n, D] hidden states to sample from, for `step.sample`: decode rows, then the last row of each
            chunk; None if the bucket has neither.
        train: {"logp", "correct"} of the train rows, [G * L]; {} without train rows.
        score: See `step.head.score_rows`; {} without score rows.
        kept: See Kept; [] without train rows.
        hidden: [G * L, D] hidden states of the train rows; None without.
    """

    sample_hidden: Float[Array, "n D"] | None
    train: dict[str, Array]
    score: dict[str, Array]
    kept: Kept
    hidden: Float[Array, "T D"] | None


def unified_step(
    spec: DecoderSpec,
    cfg: EngineConfig,
    bucket: Bucket,
    use_dropout: bool,
    params: Params,
    pages: AdapterPages,
    kv: list[KVCache],
    last_token: Int[Array, " S"],
    batch: SegmentBatch,
) -> tuple[list[KVCache], ForwardOut]:
    """One forward over all kinds of rows; pure. Tokens are then drawn from its result by `step.sample`.

    Args:
        spec, cfg, bucket, use_dropout: Static; `use_dropout` enables LoRA dropout in train rows.
        params: The frozen base.
        pages: Adapter pages; read-only.
        kv: KV cache per layer.
        last_token: Per slot, the input token of its decode row.
        batch: The rows, in the shapes of `batch.rows.empty_batch(bucket, cfg)`.

    Returns:
        (KV cache updated with the rows' keys and values, ForwardOut).
    """
    x = embed(spec, params, tokens_of(batch, last_token))
    rope = rope_tables(spec, positions_of(batch))
    x, kv, kept = run_layers(spec, cfg, bucket, use_dropout, params["layers"], pages, kv, batch, x, rope)
    t, s = bucket.train_rows, bucket.score_rows
    train, score = {}, {}
    if t:
        train = score_rows(spec, params, x[:t], batch.train.rows.targets, limit=cfg.logit_chunk, top=0)
    if s:
        scored = x[t : t + s]
        score = score_rows(spec, params, scored, batch.score.targets, limit=cfg.logit_chunk, top=cfg.max_logprobs)
    sampling = sample_rows(bucket, batch, x[t + s :]) if bucket.samples else None
    return kv, ForwardOut(sample_hidden=sampling, train=train, score=score, kept=kept, hidden=x[:t] if t else None)


def jit_unified_step(
    spec: DecoderSpec, cfg: EngineConfig, bucket: Bucket, use_dropout: bool = False
) -> Callable[..., Any]:
    """`unified_step` under jax.jit, with the batch as one int32 buffer and a donated KV cache.

    Returns:
        (params, pages, kv*, last_token, flat) -> (kv, ForwardOut); * donated and replaced by the returned one. `flat`
        is `batch.rows.ravel(batch)`, which takes one copy to the device instead of dozens.
    """
    template = shapes_of(empty_batch(bucket, cfg))

    def unified_step_of_buffer(
        params: Params, pages: AdapterPages, kv: list[KVCache], last_token: Int[Array, " S"], flat: Int[Array, " N"]
    ) -> tuple[list[KVCache], ForwardOut]:
        batch = unravel(template, flat)
        return unified_step(spec, cfg, bucket, use_dropout, params, pages, kv, last_token, batch)

    return jax.jit(unified_step_of_buffer, donate_argnums=(2,), keep_unused=True)


def tokens_of(batch: SegmentBatch, last_token: Int[Array, " S"]) -> Int[Array, " T"]:
    """Token ids of all rows in flat order; decode rows use their slot's last token."""
    parts = [
        batch.train.rows.tokens if batch.train else None,
        batch.score.tokens if batch.score else None,
        batch.prefill.tokens if batch.prefill else None,
        last_token[batch.decode.slots] if batch.decode else None,
    ]
    return jnp.concatenate([p for p in parts if p is not None])


def run_layers(
    spec: DecoderSpec,
    cfg: EngineConfig,
    bucket: Bucket,
    use_dropout: bool,
    layers: Sequence[LayerWeights],
    pages: AdapterPages,
    kv: list[KVCache] | None,
    batch: SegmentBatch,
    x: Float[Array, "T D"],
    rope: Rope,
    first: int = 0,
) -> tuple[Float[Array, "T D"], list[KVCache | None], Kept]:
    """Runs layers first, first + 1, ... on the rows x; `layers`, `pages` and `kv` are those of the slice."""
    kept, written, plan = [], [], lora_plan(batch, bucket)
    for i, (w, lora) in enumerate(zip(layers, pages.layers, strict=True)):
        ops = ForwardOps(spec, cfg, bucket, first + i, w, lora, kv[i] if kv else None, batch, plan, use_dropout)
        y, plan = layer(spec, w, x, rope, ops), ops.plan
        if bucket.packs:
            kept.append(dict(ops.kept, x=x[: bucket.train_rows]))
        written.append(ops.kv)
        x = y
    return x, written, kept


def sample_rows(bucket: Bucket, batch: SegmentBatch, x: Float[Array, "rows D"]) -> Float[Array, "n D"]:
    """The rows to sample from, among the prefill and decode rows x: decode rows, then each chunk's last row."""
    decode = x[bucket.prefill :]
    if batch.prefill is None:
        return decode
    return jnp.concatenate([decode, x[batch.prefill.last_row]])
