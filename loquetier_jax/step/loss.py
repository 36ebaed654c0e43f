"""Log-probabilities of the targets: the only thing a loss ever sees, and the only way its gradient comes back."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from loquetier_jax.config import PACK_ALIGN
from loquetier_jax.models.decoder import final_norm, logits
from loquetier_jax.models.spec import DecoderSpec

Loss = Callable[[Float[Array, " L"], Float[Array, " L"]], Float[Array, ""]]


def chunk_rows(rows: int, limit: int) -> int:
    """The largest divisor of `rows` that is a multiple of PACK_ALIGN and at most `limit` (PACK_ALIGN at least)."""
    fits = [
        c for c in range(PACK_ALIGN, rows + 1, PACK_ALIGN) if rows % c == 0 and c <= max(limit, PACK_ALIGN)
    ]
    return max(fits)


def token_scores(
    spec: DecoderSpec, params: dict[str, Any], x: Float[Array, "C D"], targets: Int[Array, " C"]
) -> tuple[Float[Array, " C"], Float[Array, "C V"]]:
    """Log-probs of `targets` and of the whole vocabulary for one chunk of final hidden states (before the norm)."""
    logp = jax.nn.log_softmax(logits(spec, params, final_norm(spec, params, x)), axis=-1)
    return jnp.take_along_axis(logp, targets[:, None], axis=1)[:, 0], logp


def score_rows(
    spec: DecoderSpec,
    params: dict[str, Any],
    x: Float[Array, "T D"],
    targets: Int[Array, " T"],
    *,
    limit: int,
    top: int,
) -> dict[str, Array]:
    """Scores rows chunk by chunk, so that vocabulary-sized logits exist only for `limit` rows at once.

    Returns:
        {"logp": [T] f32, "correct": [T] bool, whether the target is the arg max}; with top > 0 also
        {"top_ids": [T, top] i32, "top_logp": [T, top] f32, "rank": [T] i32, 1 = most likely}.
    """
    c = chunk_rows(x.shape[0], limit)

    def chunk(args: tuple[Array, Array]) -> dict[str, Array]:
        own, logp = token_scores(spec, params, *args)
        out = {"logp": own, "correct": jnp.argmax(logp, axis=-1).astype(jnp.int32) == args[1]}
        if top:
            values, ids = jax.lax.top_k(logp, top)
            rank = 1 + (logp > own[:, None]).sum(axis=-1, dtype=jnp.int32)
            out |= {"top_ids": ids.astype(jnp.int32), "top_logp": values, "rank": rank}
        return out

    out = jax.lax.map(chunk, (x.reshape(-1, c, x.shape[1]), targets.reshape(-1, c)))
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), out)


def backward_head(
    spec: DecoderSpec,
    params: dict[str, Any],
    x: Float[Array, "T D"],
    targets: Int[Array, " T"],
    dlogp: Float[Array, " T"],
    *,
    limit: int,
) -> Float[Array, "T D"]:
    """d loss / d x (final hidden states, before the norm) from d loss / d log-prob; logits are recomputed by chunk."""
    c = chunk_rows(x.shape[0], limit)

    def chunk(args: tuple[Array, Array, Array]) -> Array:
        x, targets, dlogp = args
        return jax.vjp(lambda x: token_scores(spec, params, x, targets)[0], x)[1](dlogp)[0]

    dx = jax.lax.map(chunk, (x.reshape(-1, c, x.shape[1]), targets.reshape(-1, c), dlogp.reshape(-1, c)))
    return dx.reshape(x.shape)


def loss_cotangent(
    loss: Loss | None, logp: Float[Array, "G L"], weights: Float[Array, "G L"]
) -> Float[Array, "G L"]:
    """d loss / d log-prob, pack by pack.

    Args:
        loss: None for cross-entropy (loss = -sum(weights * logp), so the cotangent is -weights), or a function of one
            pack's (logp [L], weights [L]) that returns the SUM of its token losses; weights are 0 on padding.
    """
    if loss is None:
        return -weights
    return jax.vmap(jax.grad(lambda lp, w: loss(lp, w)))(logp, weights)


def finite(tree: Any) -> Bool[Array, ""]:
    """Whether every number of the tree is finite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
