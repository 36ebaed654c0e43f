"""Losses and their cotangents: a loss sees the log-probs of its targets, and its gradient comes back through them."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from loquetier_jax.errors import ConfigError
from loquetier_jax.step.loss_batch import LossBatch
from loquetier_jax.step.loss_function import takes_batch

Loss = Callable[..., Float[Array, ""]]  # (logp [L], weights [L]) or (logp [L], weights [L], LossBatch)


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
