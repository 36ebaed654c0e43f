"""Losses and their cotangents: a loss is a function of the targets' log-probs, and so is its gradient."""

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
    """The value of a custom loss for one pack, f32.

    Raises:
        ConfigError: it raises, or does not return a float scalar.
    """
    arguments = (logp, weights, batch) if takes_batch(loss) else (logp, weights)
    try:
        value = jnp.asarray(loss(*arguments))
    except Exception as error:  # user code may raise anything
        missing = f"; the samples have extras: {', '.join(batch.extras) or 'none'}"
        why = f"{str(error).partition(chr(10))[0]}{missing if isinstance(error, KeyError) else ''}"
        raise ConfigError(f"loss: {type(error).__name__}: {why}") from error
    if value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
        got = f"{value.dtype}{list(value.shape)}"
        raise ConfigError(f"loss: the function returned {got}, expected a float scalar, the sum over the pack")
    return value.astype(jnp.float32)


def loss_cotangent(
    loss: Loss | None, logp: Float[Array, "G L"], weights: Float[Array, "G L"], batch: LossBatch
) -> tuple[Float[Array, " G"] | None, Float[Array, "G L"]]:
    """Losses and d loss / d log-prob, pack by pack: a loss sees one pack at a time, whatever else is in the step.

    Args:
        loss: None for cross-entropy (loss = -sum(weights * logp), so the cotangent is -weights), or a function that
            returns the sum over one pack.
        logp: Log-probs; those of padding may be anything and get no gradient.
        weights: Loss weights of the targets, 0 on padding.
        batch: A LossBatch with leaves of leading axis G.

    Returns:
        (losses, or None for cross-entropy, which the host sums exactly; cotangent).
    """
    if loss is None:
        return None, -weights

    def one(args: tuple[Array, Array, LossBatch]) -> tuple[Array, Array]:
        return jax.value_and_grad(functools.partial(loss_value, loss))(*args)

    values, dlogp = jax.lax.map(one, (logp, weights, batch))
    return values, jnp.where(batch.segment_ids >= 0, dlogp, 0)
