"""The backward, by replay: train rows only, in slices of layers, gradients of adapters in training only."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from loquetier_jax.adapters.pages import AdapterPages, LoraPages
from loquetier_jax.batch.rows import TrainRows, unravel
from loquetier_jax.config import EngineConfig
from loquetier_jax.models.decoder import LayerWeights, Params, layer, rope_tables
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.step.head import backward_head
from loquetier_jax.step.loss import Loss, loss_cotangent
from loquetier_jax.step.loss_batch import LossBatch
from loquetier_jax.step.replay import ReplayOps
from loquetier_jax.step.unified import Kept
from pallas_kernels import scatter_add_pages
from pallas_kernels.smlm import pack_plan


def backward_start(
    spec: DecoderSpec,
    cfg: EngineConfig,
    packs: int,
    loss: Loss | None,
    template: TrainRows,
    head: Params,
    hidden: Float[Array, "T D"],
    logp: Float[Array, " T"],
    flat: Int[Array, " N"],
    extras: dict[str, Float[Array, "G _"]],
) -> tuple[Float[Array, "T D"], Float[Array, " G"] | None]:
    """From the log-probs of the targets to d loss / d hidden.

    Args:
        packs, loss, template: Static: G, the jobs' own loss or None, shapes of the TrainRows.
        head: {"norm", "lm_head" or "embed_tokens"}.
        hidden: [T, D] final hidden states of the train rows. (Not donated: it is also the last layer's output.)
        logp: [T] as the forward returned them; a loss may depend on them.
        flat: The TrainRows as one int32 buffer.
        extras: [G, L] or [G, S] each, what the samples brought along for `loss`; {} without one.

    Returns:
        [T, D] in the compute dtype; the loss of each pack, [G] f32, None for cross-entropy.
    """
    train = unravel(template, flat)
    rows = (logp, train.weights, train.rows.targets, train.rows.positions, train.rows.segments)
    logp, weights, *rest = (a.reshape(packs, -1) for a in rows)
    losses, dlogp = loss_cotangent(loss, logp, weights, LossBatch(*rest, extras))
    dx = backward_head(spec, head, hidden, train.rows.targets, dlogp.reshape(-1), limit=cfg.logit_chunk)
    return dx, losses


def backward_slice(
    spec: DecoderSpec,
    cfg: EngineConfig,
    tokens: int,
    pack_pages: int,
    use_dropout: bool,
    window_layer: int,
    template: TrainRows,
    layers: list[LayerWeights],
    pages: AdapterPages,
    kept: Kept,
    dx: Float[Array, "T D"],
    grads: AdapterPages,
    first: Int[Array, ""],
    flat: Int[Array, " N"],
) -> tuple[Float[Array, "T D"], AdapterPages]:
    """Replays some layers, last first, and adds their adapter gradients to the pool.

    Args:
        tokens, pack_pages, use_dropout: Static: rows of a pack, most pages of a pack's adapter, LoRA dropout.
        window_layer: Static: first layer of the slice, for its attention windows.
        layers, pages, kept, grads: Those of the slice, in order; `grads` is donated, `kept` cannot be (no output has
            its shapes): it dies when the caller drops the last reference.
        dx: [T, D] gradient of the slice's output; kept, because its readiness tells that the slice before is done.
        first: Traced index of the slice's first layer (dropout), so that slices share a compile.

    Returns:
        Gradient of the slice's input, and the pool: only rows `train.grad_pages` changed (and row 0, a bin).
    """
    train = unravel(template, flat)
    rope = rope_tables(spec, train.rows.positions)
    plan, pool_ids = pack_plan(train.pages[:, :pack_pages], tokens), train.grad_pages[:, :pack_pages]
    out = []
    for i in reversed(range(len(layers))):
        # Dead code: only their cotangents are read.
        taps = jax.tree.map(lambda a: jnp.zeros((*pool_ids.shape, *a.shape[1:]), jnp.float32), pages.layers[i])
        ops = (window_layer + i, first + i, layers[i], pages.layers[i], plan)

        def replay(x: jax.Array, taps: dict[str, LoraPages], ops=ops, kept=kept[i]) -> jax.Array:
            window, index, w, *lora = ops
            replaying = ReplayOps(spec, cfg, tokens, window, index, w, *lora, taps, kept, train, use_dropout)
            return layer(spec, w, x, rope, replaying)

        dx, delta = jax.vjp(replay, kept[i]["x"], taps)[1](dx)
        out.append(scatter_add_pages(grads.layers[i], pool_ids, delta, implementation=cfg.smlm))
    return dx, AdapterPages(out[::-1])
