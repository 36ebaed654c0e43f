"""Makes the completions of a prompt."""

from collections.abc import Collection, Sequence

import numpy as np

from loquetier_jax.errors import RequestError
from loquetier_jax.sampling_params import SamplingParams
from loquetier_jax.serve.output import RequestMetrics
from loquetier_jax.serve.request import Request
from loquetier_jax.serve.text import Detokenizer, StopChecker
from loquetier_jax.serve.tokenizer_type import PreTrainedTokenizerBase


def make_requests(
    request_id: str,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    *,
    arrival: float,
    max_model_len: int,
    default_seed: int = 0,
    adapter: str | None = None,
    prompt: str | None = None,
    cache_salt: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    eos_token_ids: Collection[int] = (),
) -> list[Request]:
    """Builds the params.n requests of one prompt.

    Args:
        request_id: The caller's id; completion i > 0 of n has the id "{request_id}-{i}".
        prompt_ids: At least one token.
        params: Sampling parameters.
        arrival: Time of arrival, in seconds.
        max_model_len: Maximum tokens of prompt and output together.
        default_seed: Used if params.seed is None; should differ between requests.
        adapter: Adapter name; None for the base.
        prompt: The prompt text, if given as text.
        cache_salt: See Request.
        tokenizer: If None, outputs have no text.
        eos_token_ids: End-of-sequence ids of the model.

    Raises:
        RequestError: an empty prompt, no room for prompt + max_tokens, stop strings without a tokenizer.
    """
    _check(prompt_ids, params, max_model_len, tokenizer)
    ids = tuple(int(i) for i in prompt_ids)
    base = default_seed if params.seed is None else params.seed
    return [
        Request(
            id=request_id if i == 0 else f"{request_id}-{i}",
            request_id=request_id,
            prompt_ids=ids,
            params=params,
            seed=completion_seed(base, i),
            metrics=RequestMetrics(arrival),
            adapter=adapter,
            index=i,
            prompt=prompt,
            cache_salt=cache_salt,
            eos_token_ids=frozenset(eos_token_ids),
            detokenizer=Detokenizer(tokenizer, ids, params.skip_special_tokens) if tokenizer else None,
            stops=StopChecker(params.stop),
        )
        for i in range(params.n)
    ]


def _check(
    prompt_ids: Sequence[int],
    params: SamplingParams,
    max_model_len: int,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    if not len(prompt_ids):
        raise RequestError("prompt: got no tokens, expected at least one")
    total = len(prompt_ids) + params.max_tokens
    if total > max_model_len:
        raise RequestError(
            f"prompt: got {len(prompt_ids)} tokens + max_tokens {params.max_tokens} = {total}, "
            f"expected <= max_model_len {max_model_len}"
        )
    if params.stop and tokenizer is None:
        raise RequestError(f"stop: got {params.stop!r}, expected none: this engine has no tokenizer")


def completion_seed(seed: int, index: int) -> int:
    """The 32-bit seed of completion `index`, hashed so that neighbouring seeds and indices are unrelated."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint32)[0])
