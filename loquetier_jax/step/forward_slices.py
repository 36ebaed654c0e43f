"""The forward of train rows alone, some layers at a time, for packs whose whole one would overrun a promise."""

from jaxtyping import Array, Float, Int

from loquetier_jax.adapters.pages import AdapterPages
from loquetier_jax.batch.rows import SegmentBatch, unravel
from loquetier_jax.config import Bucket, EngineConfig
from loquetier_jax.models.decoder import LayerWeights, Params, embed, rope_tables
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.step.head import score_rows
from loquetier_jax.step.unified import Kept, run_layers


def forward_start(
    spec: DecoderSpec, template: SegmentBatch, params: Params, flat: Int[Array, " N"]
) -> Float[Array, "T D"]:
    """Embeddings of the train rows of a step that has no other rows.

    Args:
        spec, template: Static: the base, and the shapes of the batch.
        params: The frozen base.
        flat: The batch as one int32 buffer.
    """
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
    x: Float[Array, "T D"],
    flat: Int[Array, " N"],
) -> tuple[Float[Array, "T D"], Kept]:
    """Some layers.

    Args:
        spec, cfg, bucket, template, use_dropout, first: Static: what is compiled; index of the first layer.
        layers, pages: Those of the slice, in order.
        x: The first one's input.
        flat: The batch as one int32 buffer.

    Returns:
        The last one's output, and what is kept of each.
    """
    batch = unravel(template, flat)
    rope = rope_tables(spec, batch.train.rows.positions)
    x, _, kept = run_layers(spec, cfg, bucket, use_dropout, layers, pages, None, batch, x, rope, first)
    return x, kept


def forward_end(
    spec: DecoderSpec,
    cfg: EngineConfig,
    template: SegmentBatch,
    head: Params,
    x: Float[Array, "T D"],
    flat: Int[Array, " N"],
) -> dict[str, Array]:
    """Log-probs of the targets from the final hidden states: {"logp", "correct"}, [T] each.

    Args:
        spec, cfg, template: Static: what is compiled.
        head: See `step.state.head_params`.
        x: The last layer's output.
        flat: The batch as one int32 buffer.
    """
    batch = unravel(template, flat)
    return score_rows(spec, head, x, batch.train.rows.targets, limit=cfg.logit_chunk, top=0)
