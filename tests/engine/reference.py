"""What an engine should say, worked out slowly: whole sequences through the dense model, sampling in numpy."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from loquetier_jax.engine import Engine
from loquetier_jax.models import dense
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.sampling_params import SamplingParams
from loquetier_jax.serve.make_requests import completion_seed

LENGTH = 128  # every sequence is padded to this: one compile


@functools.partial(jax.jit, static_argnums=0)
def _forward(spec: DecoderSpec, params: Any, tokens: jax.Array, lora: Any) -> jax.Array:
    return dense.forward(spec, params, tokens, lora)


def dense_lora(engine: Engine, adapter: str | None) -> dict[tuple[int, str], Any]:
    """The current version of an adapter as `dense.forward` wants it."""
    if adapter is None:
        return {}
    version = engine.adapters.get(adapter)
    weights = engine.adapters.weights(version)
    return {
        (m.layer, m.target): (weights[key]["lora_A"], weights[key]["lora_B"], np.float32(m.scaling))
        for key, m in version.shape.by_key.items()
    }


def dense_logits(engine: Engine, sequences: Sequence[Sequence[int]], lora: Any) -> list[np.ndarray]:
    """f32 [n, V] logits at every position of each sequence of n <= LENGTH tokens, eight sequences at a time."""
    out: list[np.ndarray] = []
    for start in range(0, len(sequences), 8):
        some = sequences[start : start + 8]
        tokens = np.zeros((8, LENGTH), np.int32)
        for row, ids in zip(tokens, some, strict=False):
            row[: len(ids)] = ids
        logits = np.asarray(_forward(engine.spec, engine.state.params, jnp.asarray(tokens), lora))
        out += [logits[i, : len(ids)] for i, ids in enumerate(some)]
    return out


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = np.asarray(logits, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def processed(
    logits: np.ndarray, p: SamplingParams, prompt: Sequence[int], output: Sequence[int], stop_ids: Sequence[int]
) -> np.ndarray:
    """f64 [V]: logits after bias, min_tokens, penalties, temperature, min_p, top_k and top_p, token by token.

    The definitions are those of vLLM's documentation; what is dropped is -inf. Temperature 0 leaves out all from the
    temperature on.
    """
    x = np.asarray(logits, np.float64).copy()
    for token, bias in (p.logit_bias or {}).items():
        x[token] += bias
    if len(output) < p.min_tokens:
        x[list(stop_ids)] = -np.inf
    for token in set(prompt) | set(output):
        x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
    for token in output:
        x[token] -= p.frequency_penalty
    for token in set(output):
        x[token] -= p.presence_penalty
    if p.temperature == 0:
        return x
    x /= p.temperature
    if p.min_p > 0:
        probs = np.exp(log_softmax(x))
        x[probs < p.min_p * probs.max()] = -np.inf
    if p.top_k > 0:
        x[x < np.sort(x)[-min(p.top_k, len(x))]] = -np.inf
    if p.top_p < 1:
        probs, kept, total = np.exp(log_softmax(x)), [], 0.0
        for token in np.argsort(-probs, kind="stable"):
            if total >= p.top_p:
                break
            kept.append(token)
            total += probs[token]
        x[np.setdiff1d(np.arange(len(x)), kept)] = -np.inf
    return x


def generate(
    engine: Engine, prompt: Sequence[int], adapter: str | None, p: SamplingParams, index: int = 0
) -> list[int]:
    """Completion `index` of a prompt: one dense forward over everything so far for each token."""
    lora, output = dense_lora(engine, adapter), []
    own = () if engine.tokenizer is None else (engine.tokenizer.eos_token_id,)
    stop_ids = {*(() if p.ignore_eos else (*engine.spec.eos_token_ids, *own)), *p.stop_token_ids}
    key = jax.random.key(np.uint32(completion_seed(p.seed or 0, index)))
    while len(output) < p.max_tokens:
        logits = dense_logits(engine, [[*prompt, *output]], lora)[0][-1]
        x = processed(logits, p, prompt, output, sorted(stop_ids))
        if p.temperature == 0:
            token = int(x.argmax())
        else:
            masked = jnp.asarray(np.where(np.isinf(x), -1e30, x).astype(np.float32))
            token = int(jax.random.categorical(jax.random.fold_in(key, len(output)), masked))
        output.append(token)
        if token in stop_ids and len(output) > p.min_tokens:
            break
    return output
