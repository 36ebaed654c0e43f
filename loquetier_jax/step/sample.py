"""Sampling on the device with per-row parameters, as a separate compiled function after the forward.

Transforms are applied in the same order as in vLLM.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from loquetier_jax.batch.rows import SampleRows, unravel
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.sampling_params import Level
from loquetier_jax.step.head import Distribution, distribution
from loquetier_jax.step.selection import threshold

NEGATIVE = -1e30


@struct.dataclass
class SlotState:
    """Per-request state on the device, S slots; the last row is the trash slot for padding rows.

    Attributes:
        last_token: [S + 1] input token of the next decode row.
        counts: [S + 1, V] how often the request has produced each token.
        prompt_seen: [S + 1, V] whether its prompt contains the token.
    """

    last_token: Int[Array, " S"]
    counts: Int[Array, "S V"]
    prompt_seen: Bool[Array, "S V"]


def empty_slots(num_slots: int, vocab_size: int) -> SlotState:
    """Unused slots."""
    return SlotState(
        last_token=jnp.zeros(num_slots + 1, jnp.int32),
        counts=jnp.zeros((num_slots + 1, vocab_size), jnp.int32),
        prompt_seen=jnp.zeros((num_slots + 1, vocab_size), bool),
    )


def admit_slot(
    slots: SlotState, slot: Int[Array, ""], prompt: Int[Array, " S"], length: Int[Array, ""]
) -> SlotState:
    """Resets the penalty statistics of `slot` for a new request; `prompt` is padded. `slots` is donated."""
    vocab = slots.counts.shape[1]
    ids = jnp.where(jnp.arange(prompt.shape[0]) < length, prompt, vocab)  # out of bounds: dropped
    seen = jnp.zeros(vocab, bool).at[ids].set(True, mode="drop")
    return slots.replace(
        counts=slots.counts.at[slot].set(0), prompt_seen=slots.prompt_seen.at[slot].set(seen)
    )


def penalize(logits: Float[Array, "n V"], rows: SampleRows, slots: SlotState) -> Float[Array, "n V"]:
    """logit_bias, min_tokens, then repetition (prompt and output), presence and frequency (output) penalties."""
    n, vocab = logits.shape
    at = jnp.arange(n)[:, None]
    logits = logits.at[at, jnp.where(rows.bias_ids < 0, vocab, rows.bias_ids)].add(rows.bias, mode="drop")
    logits = logits.at[at, jnp.where(rows.banned_ids < 0, vocab, rows.banned_ids)].set(NEGATIVE, mode="drop")
    counts, seen = slots.counts[rows.slots], slots.prompt_seen[rows.slots]
    repetition = jnp.where((counts > 0) | seen, rows.repetition_penalty[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = logits - rows.frequency_penalty[:, None] * counts.astype(jnp.float32)
    return logits - rows.presence_penalty[:, None] * (counts > 0).astype(jnp.float32)


def truncate(logits: Float[Array, "n V"], rows: SampleRows) -> Float[Array, "n V"]:
    """Applies min_p, top_k and top_p to temperature-scaled logits; excluded tokens become NEGATIVE.

    Each keeps the tokens at or above some logit. top_p is about the probabilities of those that min_p and top_k leave.
    """
    best = logits.max(axis=-1)
    everything = jnp.full_like(best, -jnp.inf)
    floor = jnp.where(rows.min_p > 0, best + jnp.log(jnp.maximum(rows.min_p, 1e-30)), everything)
    by_rank, by_mass = rows.top_k > 0, rows.top_p < 1.0

    def rank_floor(logits: Float[Array, "n V"]) -> Float[Array, " n"]:
        k = jnp.minimum(rows.top_k, logits.shape[-1]).astype(jnp.float32)
        return jnp.where(by_rank, threshold(logits, jnp.ones_like(logits), k), everything)

    def mass_floor(logits: Float[Array, "n V"], floor: Float[Array, " n"]) -> Float[Array, " n"]:
        p = jnp.where(logits < floor[:, None], 0.0, jnp.exp(logits - best[:, None]))
        reached = threshold(logits, p, jnp.maximum(rows.top_p * p.sum(axis=-1), 1e-30))
        # With top_p = 1 the f32 sum may reach 1 before the tail; near 1, that of all tokens may fall short of it.
        return jnp.where(by_mass & ~jnp.isnan(reached), reached, everything)

    floor = jnp.maximum(floor, jax.lax.cond(by_rank.any(), rank_floor, lambda _: everything, logits))
    floor = jnp.maximum(floor, jax.lax.cond(by_mass.any(), mass_floor, lambda *_: everything, logits, floor))
    return jnp.where(logits < floor[:, None], NEGATIVE, logits)


def sample_hidden(
    spec: DecoderSpec,
    level: Level,
    max_logprobs: int,
    template: SampleRows,
    head: dict[str, Any],
    slots: SlotState,
    x: Float[Array, "n D"],
    flat: Int[Array, " N"],
) -> tuple[SlotState, dict[str, Array]]:
    """Draws a token from each of a forward's `sample_hidden` rows; see `sample`. `slots` is donated.

    Args:
        spec, level, max_logprobs, template: Static; `template` has the shapes of the SampleRows.
        head: See `step.state.head_params`.
        slots: Per-request state.
        x: The rows.
        flat: The SampleRows as one int32 buffer.
    """
    rows = unravel(template, flat)
    return sample(distribution(spec, head, x), rows, slots, level=level, max_logprobs=max_logprobs)


def sample(
    said: Distribution, rows: SampleRows, slots: SlotState, *, level: Level, max_logprobs: int
) -> tuple[SlotState, dict[str, Array]]:
    """Draws one token per row and records it in the row's slot.

    The random key of a token depends only on (request seed, output index), not on the batch. Returned log-probs are the
    model's own (before bias, penalties and temperature), as is vLLM's default.

    Args:
        said: The rows' next-token distributions.
        rows: Sampling parameters of the rows.
        slots: Per-request state.
        level: See `sampling_params.Level`; parameters beyond this level are ignored.
        max_logprobs: Maximum alternatives.

    Returns:
        (slots, {"tokens": [n] i32, "logprob": [n] f32}); at levels "greedy_logprobs" and "full" the dict also has the
        arrays of `Distribution.alternatives`.
    """
    logits = penalize(said.logits, rows, slots) if level == "full" else said.logits
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if level in ("plain", "full"):
        hot = rows.temperature > 0
        scaled = truncate(logits / jnp.where(hot, rows.temperature, 1.0)[:, None], rows)
        tokens = jnp.where(hot, draw(scaled, rows), tokens)
    out = {"tokens": tokens, "logprob": said.logp_of(tokens)}
    slots = slots.replace(last_token=slots.last_token.at[rows.slots].set(tokens))
    if level in ("greedy_logprobs", "full") and max_logprobs:
        out |= said.alternatives(tokens, max_logprobs)
    if level == "full":
        slots = slots.replace(counts=slots.counts.at[rows.slots, tokens].add(1))
    return slots, out


def draw(logits: Float[Array, "n V"], rows: SampleRows) -> Int[Array, " n"]:
    """One categorical draw per row, keyed by (seed, output index)."""

    def one(logits: Float[Array, " V"], seed: Array, index: Array) -> Int[Array, ""]:
        key = jax.random.fold_in(jax.random.key(seed), index)
        return jax.random.categorical(key, logits).astype(jnp.int32)

    return jax.vmap(one)(logits, rows.seed, rows.index)
