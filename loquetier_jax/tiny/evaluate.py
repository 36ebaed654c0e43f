"""Evaluates the embedded base: held-out loss, and exact-match accuracy per skill.

    python -m loquetier_jax.tiny.evaluate [FOLDER]
"""

import argparse
import functools
import logging
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from loquetier_jax.models import dense
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.tiny import base_path, corpus
from loquetier_jax.tiny.tokenizer import BOS, EOS, PAD

logger = logging.getLogger(__name__)

HELD_OUT = "held-out"  # a seed never used in pretraining
# Skills whose questions have exactly one correct answer.
EXACT = tuple(skill for skill in corpus.SKILLS if skill not in ("story", "listing", "talk"))
PROMPT_TOKENS, NEW_TOKENS = 192, 80


@functools.partial(jax.jit, static_argnums=0)
def loss(spec: DecoderSpec, params: dict[str, Any], tokens: Int[Array, "B T"]) -> Float[Array, ""]:
    """Mean cross-entropy in nats per token, over all tokens but the first of each row."""
    logp = jax.nn.log_softmax(dense.forward(spec, params, tokens)[:, :-1])
    return -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1).mean()


def held_out_rows(count: int, length: int) -> Int[np.ndarray, "B T"]:
    """Rows of generated text not used in pretraining."""
    return np.array(list(corpus.rows(HELD_OUT, count, length)), np.int32)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _greedy(
    spec: DecoderSpec,
    params: dict[str, Any],
    tokens: Int[Array, "B T"],
    ends: Int[Array, " B"],
    count: int,
) -> Int[Array, "B T"]:
    """Extends each row from position `ends` by `count` argmax tokens, recomputing the whole row each time."""
    rows = jnp.arange(tokens.shape[0])

    def extend(i: Array, tokens: Array) -> Array:
        logits = dense.forward(spec, params, tokens)[rows, ends + i - 1]
        return tokens.at[rows, ends + i].set(logits.argmax(-1).astype(tokens.dtype))

    return jax.lax.fori_loop(0, count, extend, tokens)


def complete(spec: DecoderSpec, params: dict[str, Any], prompts: list[str], new_tokens: int) -> list[str]:
    """Greedy continuations of plain prompts, without a KV cache.

    Args:
        spec: Architecture.
        params: Parameters; their dtype is the compute dtype.
        prompts: Plain texts of at most PROMPT_TOKENS - 1 bytes.
        new_tokens: Tokens to generate; <|eos|> and everything after it is cut off.
    """
    ids = [[BOS, *prompt.encode()] for prompt in prompts]
    tokens = np.full((len(ids), PROMPT_TOKENS + new_tokens), PAD, np.int32)
    for row, prompt in zip(tokens, ids, strict=True):
        row[: len(prompt)] = prompt
    ends = np.array([len(prompt) for prompt in ids], np.int32)
    out = np.asarray(_greedy(spec, params, tokens, ends, new_tokens))
    texts = (row[end : end + new_tokens].tolist() for row, end in zip(out, ends, strict=True))
    return [bytes(t for t in _until_eos(text) if t < 256).decode(errors="replace") for text in texts]


def _until_eos(ids: list[int]) -> list[int]:
    return ids[: ids.index(EOS)] if EOS in ids else ids


def accuracy(spec: DecoderSpec, params: dict[str, Any], skill: str, count: int) -> tuple[float, str]:
    """(fraction of a skill's held-out exchanges answered exactly, one example to look at).

    A completion counts if it starts with the correct answer and then ends or starts a new line.
    """
    rng = random.Random(f"{HELD_OUT} {skill}")
    asked = [corpus.exchange(rng, skill) for _ in range(count)]
    answers = complete(spec, params, [e.prompt for e in asked], NEW_TOKENS)
    hits = sum((a + "\n").startswith(e.completion + "\n") for e, a in zip(asked, answers, strict=True))
    return hits / count, asked[0].prompt + answers[0]


def report(spec: DecoderSpec, params: dict[str, Any], *, count: int = 64, rows: int = 16) -> dict[str, Any]:
    """Held-out loss, accuracy of each exact skill and a sample of every skill; logs them along the way.

    Args:
        spec: Architecture.
        params: Parameters.
        count: Exchanges per skill.
        rows: Held-out rows of 512 tokens for the loss.
    """
    held_out = float(loss(spec, params, held_out_rows(rows, 512)))
    result: dict[str, Any] = {"loss": held_out, "accuracy": {}, "samples": {}}
    logger.info("held-out loss %.4f nats a byte", held_out)
    for skill in corpus.SKILLS:
        share, result["samples"][skill] = accuracy(spec, params, skill, count)
        if skill in EXACT:
            result["accuracy"][skill] = share
        exact = f"exact {share:.3f}" if skill in EXACT else "no single answer"
        logger.info("[%s] %s\n%s", skill, exact, result["samples"][skill])
    return result


def main() -> None:
    """Command line: evaluates a model folder, by default the embedded base."""
    from loquetier_jax.models.load import load_hf

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default=str(base_path()))
    parser.add_argument("--count", type=int, default=16, help="exchanges per skill")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    spec, params = load_hf(args.folder, jnp.float32)
    report(spec, params, count=args.count)


if __name__ == "__main__":
    main()
