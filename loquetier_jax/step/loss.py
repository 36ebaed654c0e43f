"""Log-probabilities of the targets: what every loss is a function of, and the only way its gradient comes back."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from loquetier_jax.config import PACK_ALIGN
from loquetier_jax.errors import ConfigError
from loquetier_jax.models.decoder import final_norm, logits, logits_transpose
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.step.loss_batch import LossBatch
from loquetier_jax.step.loss_function import takes_batch

Loss = Callable[..., Float[Array, ""]]  # (logp [L], weights [L]) or (logp [L], weights [L], LossBatch)


def chunk_rows(rows: int, limit: int) -> int:
    """The largest divisor of `rows` that is a multiple of PACK_ALIGN and at most `limit` (PACK_ALIGN at least)."""
    fits = [
        c for c in range(PACK_ALIGN, rows + 1, PACK_ALIGN) if rows % c == 0 and c <= max(limit, PACK_ALIGN)
    ]
    return max(fits)


def chunk_logits(
    spec: DecoderSpec, params: dict[str, Any], x: Float[Array, "C D"]
) -> tuple[Float[Array, "C V"], Float[Array, " C"], Float[Array, " C"]]:
    """f32 logits of one chunk of final hidden states (before the norm), their maximum, and log sum exp(z - maximum).

    A log-prob is (z - maximum) - that logarithm, as in jax.nn.log_softmax, but nothing of the vocabulary's size is
    written besides the logits.
    """
    z = logits(spec, params, final_norm(spec, params, x))
    top = z.max(axis=-1)
    return z, top, jnp.log(jnp.exp(z - top[:, None]).sum(axis=-1))


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
        x, targets = args
        z, best, total = chunk_logits(spec, params, x)
        own = jnp.take_along_axis(z, targets[:, None], axis=1)[:, 0]
        out = {"logp": (own - best) - total, "correct": jnp.argmax(z, axis=-1).astype(jnp.int32) == targets}
        if top:
            values, ids = jax.lax.top_k(z, top)
            out |= {
                "top_ids": ids.astype(jnp.int32),
                "top_logp": (values - best[:, None]) - total[:, None],
                "rank": 1 + (z > own[:, None]).sum(axis=-1, dtype=jnp.int32),
            }
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
        z, best, total = chunk_logits(spec, params, x)
        p = jnp.exp((z - best[:, None]) - total[:, None])
        target = jnp.arange(z.shape[1], dtype=jnp.int32)[None] == targets[:, None]
        dz = (target.astype(jnp.float32) - p) * dlogp[:, None]
        normed = jax.vjp(functools.partial(final_norm, spec, params), x)[1]
        return normed(logits_transpose(spec, params, dz))[0]

    dx = jax.lax.map(chunk, (x.reshape(-1, c, x.shape[1]), targets.reshape(-1, c), dlogp.reshape(-1, c)))
    return dx.reshape(x.shape)


def loss_value(
    loss: Loss, logp: Float[Array, " L"], weights: Float[Array, " L"], batch: LossBatch
) -> Float[Array, ""]:
    """A loss of one's own for one pack, f32.

    Raises:
        ConfigError: it raises, or returns something else than a scalar.
    """
    arguments = (logp, weights, batch) if takes_batch(loss) else (logp, weights)
    try:
        value = jnp.asarray(loss(*arguments))
    except Exception as error:  # whatever a function of the user's raises
        missing = f"; the samples bring along: {', '.join(batch.extras) or 'nothing'}"
        why = f"{str(error).partition(chr(10))[0]}{missing if isinstance(error, KeyError) else ''}"
        raise ConfigError(f"loss: {type(error).__name__}: {why}") from error
    if value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
        got = f"{value.dtype}{list(value.shape)}"
        raise ConfigError(f"loss: got a function that returns {got}, expected a float scalar: the sum over the pack")
    return value.astype(jnp.float32)


def loss_cotangent(
    loss: Loss | None, logp: Float[Array, "G L"], weights: Float[Array, "G L"], batch: LossBatch
) -> tuple[Float[Array, " G"] | None, Float[Array, "G L"]]:
    """Losses and d loss / d log-prob, pack by pack: a loss sees one pack at a time, whoever shares the step.

    Args:
        loss: None for cross-entropy (loss = -sum(weights * logp), so the cotangent is -weights), or a function of one
            pack that returns the SUM of what it has to add.
        logp: Log-probs; those of padding may be anything, and no gradient goes back to them.
        weights: Loss weights of the targets, 0 on padding.
        batch: Leaves with a leading G.

    Returns:
        The losses, None for cross-entropy, which the host sums exactly; and the cotangent.
    """
    if loss is None:
        return None, -weights

    def one(args: tuple[Array, Array, LossBatch]) -> tuple[Array, Array]:
        return jax.value_and_grad(functools.partial(loss_value, loss))(*args)

    values, dlogp = jax.lax.map(one, (logp, weights, batch))
    return values, jnp.where(batch.segment_ids >= 0, dlogp, 0)
