"""Sampling on the device with per-row parameters. Order of the transforms as vLLM's."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from loquetier_jax.batch.rows import SampleRows

NEGATIVE = -1e30


@flax.struct.dataclass
class SlotState:
    """What a running request keeps on the device; the last row is the trash slot of padding rows.

    Attributes:
        last_token: [S + 1] the token its next decode row starts from.
        counts: [S + 1, V] how often the request has produced each token.
        prompt_seen: [S + 1, V] whether its prompt holds the token.
    """

    last_token: Int[Array, " S"]
    counts: Int[Array, "S V"]
    prompt_seen: Bool[Array, "S V"]


def empty_slots(num_slots: int, vocab_size: int) -> SlotState:
    """Slots of no request."""
    return SlotState(
        last_token=jnp.zeros(num_slots + 1, jnp.int32),
        counts=jnp.zeros((num_slots + 1, vocab_size), jnp.int32),
        prompt_seen=jnp.zeros((num_slots + 1, vocab_size), bool),
    )


def admit_slot(
    slots: SlotState, slot: Int[Array, ""], prompt: Int[Array, " S"], length: Int[Array, ""]
) -> SlotState:
    """Resets the penalty statistics of `slot` to those of a fresh request; `prompt` is padded. `slots` is donated."""
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
    """min_p, top_k and top_p on temperature-scaled logits: what falls out becomes NEGATIVE."""
    floor = logits.max(axis=-1, keepdims=True) + jnp.log(jnp.maximum(rows.min_p, 1e-30))[:, None]
    logits = jnp.where((rows.min_p[:, None] > 0) & (logits < floor), NEGATIVE, logits)

    def by_rank(logits: Float[Array, "n V"]) -> Float[Array, "n V"]:
        vocab = logits.shape[-1]
        ranked = -jnp.sort(-logits, axis=-1)
        k = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, vocab), vocab)
        least = jnp.take_along_axis(ranked, k[:, None] - 1, axis=-1)
        ranked = jnp.where(ranked < least, NEGATIVE, ranked)
        p = jax.nn.softmax(ranked, axis=-1)
        # The first token is always inside; where no top_p is wanted all are: in f32 the sum reaches 1 before the tail.
        inside = ((jnp.cumsum(p, axis=-1) - p) < rows.top_p[:, None]) | (rows.top_p[:, None] >= 1)
        last = jnp.take_along_axis(ranked, inside.sum(axis=-1, dtype=jnp.int32)[:, None] - 1, axis=-1)
        return jnp.where(logits < jnp.maximum(least, last), NEGATIVE, logits)

    wanted = ((rows.top_k > 0) | (rows.top_p < 1.0)).any()
    return jax.lax.cond(wanted, by_rank, lambda logits: logits, logits)


def sample(
    logits: Float[Array, "n V"], rows: SampleRows, slots: SlotState, *, level: str, max_logprobs: int
) -> tuple[SlotState, dict[str, Array]]:
    """Draws one token a row and records it in the row's slot.

    The key of a token is f(request seed, output index), so it does not depend on where the row is batched. Returned
    log-probs are the model's own (before bias, penalties and temperature), as vLLM's default.

    Returns:
        The slots, and {"tokens": [n] i32, "logprob": [n] f32}; at level "full" also
        {"top_ids": [n, max_logprobs], "top_logp": [n, max_logprobs], "rank": [n]}.
    """
    raw = jax.nn.log_softmax(logits, axis=-1)
    if level == "full":
        logits = penalize(logits, rows, slots)
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if level != "greedy":
        hot = rows.temperature > 0
        scaled = truncate(logits / jnp.where(hot, rows.temperature, 1.0)[:, None], rows)
        tokens = jnp.where(hot, draw(scaled, rows), tokens)
    out = {"tokens": tokens, "logprob": jnp.take_along_axis(raw, tokens[:, None], axis=1)[:, 0]}
    slots = slots.replace(last_token=slots.last_token.at[rows.slots].set(tokens))
    if level == "full":
        values, ids = jax.lax.top_k(raw, max_logprobs)
        rank = 1 + (raw > out["logprob"][:, None]).sum(axis=-1, dtype=jnp.int32)
        out |= {"top_ids": ids.astype(jnp.int32), "top_logp": values, "rank": rank}
        slots = slots.replace(counts=slots.counts.at[rows.slots, tokens].add(1))
    return slots, out


def draw(logits: Float[Array, "n V"], rows: SampleRows) -> Int[Array, " n"]:
    """One categorical draw a row, keyed by (seed, output index)."""

    def one(logits: Float[Array, " V"], seed: Array, index: Array) -> Int[Array, ""]:
        key = jax.random.fold_in(jax.random.key(seed), index)
        return jax.random.categorical(key, logits).astype(jnp.int32)

    return jax.vmap(one)(logits, rows.seed, rows.index)
