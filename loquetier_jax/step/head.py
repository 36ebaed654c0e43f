"""The head: final norm, LM head and log-softmax, shared by scoring and sampling."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from loquetier_jax.config import PACK_ALIGN
from loquetier_jax.models.decoder import final_norm, logits, logits_transpose
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.step.selection import top_k


@struct.dataclass
class Distribution:
    """The next-token distributions of n rows, f32.

    A log-prob is (z - best) - total, as in jax.nn.log_softmax, but the logits are the only vocabulary-sized array.

    Attributes:
        logits: [n, V] z.
        best: [n] max z.
        total: [n] log sum exp(z - best).
    """

    logits: Float[Array, "n V"]
    best: Float[Array, " n"]
    total: Float[Array, " n"]

    def logits_of(self, tokens: Int[Array, " n"]) -> Float[Array, " n"]:
        """The logit of one token per row."""
        return jnp.take_along_axis(self.logits, tokens[:, None], axis=1)[:, 0]

    def logp_of(self, tokens: Int[Array, " n"]) -> Float[Array, " n"]:
        """The log-prob of one token per row."""
        return (self.logits_of(tokens) - self.best) - self.total

    def alternatives(self, tokens: Int[Array, " n"], top: int) -> dict[str, Array]:
        """The most likely tokens of each row, and the rank of one given token.

        Returns:
            {"top_ids": [n, top] i32, "top_logp": [n, top] f32, "rank": [n] i32 of `tokens`, 1 = most likely}.
        """
        values, ids = top_k(self.logits, top)
        own = self.logits_of(tokens)
        return {
            "top_ids": ids.astype(jnp.int32),
            "top_logp": (values - self.best[:, None]) - self.total[:, None],
            "rank": 1 + (self.logits > own[:, None]).sum(axis=-1, dtype=jnp.int32),
        }


def distribution(spec: DecoderSpec, params: dict[str, Any], x: Float[Array, "n D"]) -> Distribution:
    """Next-token distributions from final hidden states (before the norm).

    Pads to a multiple of PACK_ALIGN rows, because fewer rows take a different GEMM on the XLA CPU path, with different
    last bits. A row's result is therefore the same whether it is trained on, scored or sampled, and in any batch.
    """
    padded = jnp.pad(x, ((0, -x.shape[0] % PACK_ALIGN), (0, 0)))
    z = logits(spec, params, final_norm(spec, params, padded))[: x.shape[0]]
    best = z.max(axis=-1)
    return Distribution(z, best, jnp.log(jnp.exp(z - best[:, None]).sum(axis=-1)))


def chunk_rows(rows: int, limit: int) -> int:
    """The largest divisor of `rows` that is a multiple of PACK_ALIGN and at most max(limit, PACK_ALIGN)."""
    fits = [
        c for c in range(PACK_ALIGN, rows + 1, PACK_ALIGN) if rows % c == 0 and c <= max(limit, PACK_ALIGN)
    ]
    return max(fits)


def score_rows(
    spec: DecoderSpec,
    params: dict[str, Any],
    x: Float[Array, "T D"],
    targets: Int[Array, " T"],
    *,
    limit: int,
    top: int,
) -> dict[str, Array]:
    """Scores rows in chunks, so that vocabulary-sized logits exist for at most `limit` rows at a time.

    Returns:
        {"logp": [T] f32, "correct": [T] bool, whether the target is the argmax}; with top > 0 also the arrays of
        `Distribution.alternatives`.
    """
    c = chunk_rows(x.shape[0], limit)

    def chunk(args: tuple[Array, Array]) -> dict[str, Array]:
        x, targets = args
        said = distribution(spec, params, x)
        arg_max = jnp.argmax(said.logits, axis=-1).astype(jnp.int32)
        out = {"logp": said.logp_of(targets), "correct": arg_max == targets}
        return out | (said.alternatives(targets, top) if top else {})

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
    """d loss / d x (final hidden states, before the norm) from d loss / d log-prob; recomputes logits in chunks."""
    c = chunk_rows(x.shape[0], limit)

    def chunk(args: tuple[Array, Array, Array]) -> Array:
        x, targets, dlogp = args
        said = distribution(spec, params, x)
        p = jnp.exp((said.logits - said.best[:, None]) - said.total[:, None])
        target = jnp.arange(p.shape[1], dtype=jnp.int32)[None] == targets[:, None]
        dz = (target.astype(jnp.float32) - p) * dlogp[:, None]
        normed = jax.vjp(functools.partial(final_norm, spec, params), x)[1]
        return normed(logits_transpose(spec, params, dz))[0]

    dx = jax.lax.map(chunk, (x.reshape(-1, c, x.shape[1]), targets.reshape(-1, c), dlogp.reshape(-1, c)))
    return dx.reshape(x.shape)
