"""The unified step: train, score, prefill and decode rows through one stack of layers, base weights read once."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
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
"""By layer {"x": [G * L, D] its input, every group's S, the names in `cfg.keep`}, of the train rows."""


@flax.struct.dataclass
class ForwardOut:
    """What one forward leaves behind, beside the donated cache. Hidden states are final ones, before the norm.

    Attributes:
        sample_hidden: [n, D] those a token is drawn from, for `step.sample`: decode rows, then the last row of each
            chunk; None when the bucket has neither.
        train: {"logp", "correct"} of the train rows, [G * L]; {} without.
        score: See `step.head.score_rows`; {} without.
        kept: See Kept; [] without train rows.
        hidden: [G * L, D] those of the train rows; None without.
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
    """One step over every kind of row; pure. Tokens are drawn from what it leaves behind, by `step.sample`.

    Args:
        spec, cfg, bucket, use_dropout: Static: what is compiled. Dropout is LoRA's, on train rows.
        params: The frozen base.
        pages: Adapter pages, read only here.
        kv: Cache of each layer.
        last_token: Of every slot: where decode rows start.
        batch: The rows, in the shapes of `batch.rows.empty_batch(bucket, cfg)`.

    Returns:
        The cache with the rows' keys and values, and the rest.
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
    """`unified_step` under jax.jit as the engine calls it: with the batch as one int32 buffer, and a donated cache.

    Returns:
        (params, pages, kv*, last_token, flat) -> (kv, ForwardOut); * donated, the returned one replaces it. `flat` is
        `batch.rows.ravel(batch)`: one copy to the device instead of dozens.
    """
    template = shapes_of(empty_batch(bucket, cfg))

    def unified_step_of_buffer(
        params: Params, pages: AdapterPages, kv: list[KVCache], last_token: Int[Array, " S"], flat: Int[Array, " N"]
    ) -> tuple[list[KVCache], ForwardOut]:
        batch = unravel(template, flat)
        return unified_step(spec, cfg, bucket, use_dropout, params, pages, kv, last_token, batch)

    return jax.jit(unified_step_of_buffer, donate_argnums=(2,))


def tokens_of(batch: SegmentBatch, last_token: Int[Array, " S"]) -> Int[Array, " T"]:
    """Token ids of all rows in flat order; decode rows take the slot's last token."""
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
    """Layers first, first + 1, ... over the rows x; `layers`, `pages` and `kv` hold just those."""
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
    """The rows a token is drawn from: decode rows, then each chunk's last row; of prefill and decode rows x."""
    decode = x[bucket.prefill :]
    if batch.prefill is None:
        return decode
    return jnp.concatenate([decode, x[batch.prefill.last_row]])
