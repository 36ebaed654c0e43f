"""Sampling arguments of vLLM, transformers' `generate` and the OpenAI API that are not fields of `SamplingParams`."""

from collections.abc import Mapping
from typing import Any

from loquetier_jax.borrowed import Rule, absent, anything, only, spelled
from loquetier_jax.token_ids import listed

_MASKS = "constrained decoding is not built; logit_bias forbids or favours single tokens"


def _ids(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    return {"stop_token_ids": listed(value)}


def _do_sample(value: Any, given: Mapping[str, Any]) -> dict[str, Any] | str:
    greedy = value is False and given.get("temperature") in (0, 0.0)
    return {} if value is True or greedy else "True: use temperature=0 for greedy decoding"


VLLM_ARGUMENTS: dict[str, Rule] = {
    "stop_token_ids": _ids,
    # Other names.
    "max_new_tokens": spelled("max_tokens"),
    "max_completion_tokens": spelled("max_tokens"),
    "min_new_tokens": spelled("min_tokens"),
    "num_return_sequences": spelled("n"),
    "stop_strings": spelled("stop"),
    "eos_token_id": absent("use stop_token_ids; the model's own end tokens always count unless ignore_eos"),
    "do_sample": _do_sample,
    # Values that match what is done here.
    "detokenize": only(True, why="an output has both text and token_ids"),
    "spaces_between_special_tokens": only(True, why="the tokenizer's decoder sets the spaces"),
    "include_stop_str_in_output": only(False, why="use stop_token_ids, whose token is in the output"),
    "best_of": only(None, 1, why="use n, and choose by cumulative_logprob"),
    "num_beams": only(1, why="beam search is not built; use n with temperature > 0"),
    "use_beam_search": only(False, why="beam search is not built; use n with temperature > 0"),
    "length_penalty": only(1.0, why="beam search is not built"),
    "early_stopping": only(False, why="beam search is not built"),
    "no_repeat_ngram_size": only(None, 0, why="use repetition_penalty"),
    "echo": only(None, False, why="a RequestOutput has prompt and prompt_token_ids beside its outputs"),
    **dict.fromkeys(
        ("output_kind", "output_text_buffer_length", "flat_logprobs", "skip_clone", "use_cache", "pad_token_id",
         "user"),
        anything,
    ),
    # Unsupported.
    **dict.fromkeys(
        ("structured_outputs", "guided_decoding", "response_format", "allowed_token_ids", "bad_words",
         "logits_processors"),
        absent(_MASKS),
    ),
    "truncate_prompt_tokens": only(None, why="cut the prompt's token ids yourself"),
    "top_logprobs": only(None, why="use logprobs, the number of alternatives"),
    "stream": absent("use Engine.stream"),
    "extra_args": absent("every argument here has its own name"),
    "thinking_token_budget": only(None, why="use max_tokens"),
    "repetition_detection": absent("use repetition_penalty"),
    "max_length": only(None, why="use max_tokens, which counts the output alone"),
    "model": only(None, why="adapter is an argument of the call"),
    "cache_salt": only(None, why="cache_salt is an argument of the call"),
}  # fmt: skip
