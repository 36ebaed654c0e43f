"""Sampling parameters of a request, with vLLM's names, defaults and semantics."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

from loquetier_jax.borrowed import borrowing, plain
from loquetier_jax.errors import RequestError, short
from loquetier_jax.token_ids import listed
from loquetier_jax.vllm_arguments import VLLM_ARGUMENTS

MAX_NUMBER = 1e38
MAX_N = 16384  # vLLM's VLLM_MAX_N_SEQUENCES
MIN_TEMPERATURE = 1e-5  # vLLM's _SAMPLING_EPS: dividing logits by less could overflow

Level = Literal["greedy", "greedy_logprobs", "plain", "full"]
"""The capabilities of a compiled sampler.

"greedy" is argmax, "greedy_logprobs" adds log-probs of alternatives, "plain" is temperature, top_k, top_p and min_p;
"full" supports all of these, and penalties, bias and min_tokens.
"""
LEVELS: tuple[Level, ...] = ("greedy", "greedy_logprobs", "plain", "full")


def level_of(levels: Iterable[Level]) -> Level:
    """The cheapest level that covers all of `levels`; "greedy" if empty."""
    asked = set(levels) - {"greedy"}
    return asked.pop() if len(asked) == 1 else "full" if asked else "greedy"


def refuse(ok: bool, name: str, got: Any, expected: str) -> None:
    """Raises RequestError unless `ok`; the message names the field, the value and what was expected."""
    if not ok:
        raise RequestError(f"{name}: got {short(got, 200)}, expected {expected}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """Whether `value` is a number within float32's range; larger ones would be infinite on the device."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MAX_NUMBER


@borrowing(VLLM_ARGUMENTS, RequestError)
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen and when they end.

    Other arguments of vLLM, transformers' `generate` and the OpenAI API are accepted where they mean the same
    (`max_new_tokens`, `detokenize=True`) and refused with an explanation otherwise.

    Attributes:
        n: Completions of the prompt; more than one needs temperature > 0.
        temperature: Divides the logits; 0 is greedy, regardless of top_k, top_p and min_p; below 1e-5 becomes 0.
        top_k: Keeps the k most likely tokens; 0 or -1 keeps all.
        top_p: Keeps the smallest set of most likely tokens whose probability reaches this, in (0, 1].
        min_p: Drops tokens less likely than this times the most likely one, in [0, 1].
        repetition_penalty: Divides positive and multiplies negative logits of tokens in the prompt or output; > 0.
        presence_penalty: Subtracted once from logits of tokens in the output, in [-2, 2].
        frequency_penalty: Subtracted per occurrence in the output, in [-2, 2].
        seed: Makes the tokens reproducible, however they are batched; None lets the engine choose.
        max_tokens: Maximum output tokens, >= 1; None means all the room left beside the prompt, which stays reserved
            until the request ends.
        min_tokens: Neither end-of-sequence, stop ids nor stop strings end the output before this many tokens.
        stop: A string or strings that end the output and are not part of it. Stored as a tuple.
        stop_token_ids: Token ids that end the output; the id is returned, its text is not. Stored as a tuple.
        logit_bias: Added to the logits of these token ids.
        logprobs: Alternatives returned per output token; 0 returns only the chosen token's, None nothing.
        prompt_logprobs: The same for the tokens of the prompt.
        ignore_eos: Continues past the end-of-sequence token.
        skip_special_tokens: Omits special tokens from the text.

    Raises:
        RequestError: a value outside these ranges; the message names the field.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True

    borrowed: ClassVar[frozenset[str]]
    in_own_words: ClassVar[Callable[[Mapping[str, Any]], dict[str, Any]]]

    def __post_init__(self) -> None:
        self._check_integers()
        self._check_numbers()
        self._check_stops()
        if self.temperature < MIN_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)
        for name in ("ignore_eos", "skip_special_tokens"):
            refuse(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        greedy_n = self.n == 1 or self.temperature > 0
        refuse(greedy_n, "n", self.n, "1 when temperature is 0 (all completions would be the same)")

    def _check_integers(self) -> None:
        refuse(_is_int(self.n) and 1 <= self.n <= MAX_N, "n", self.n, f"an integer in [1, {MAX_N}]")
        for name, low in (("top_k", -1), ("max_tokens", 1), ("min_tokens", 0)):
            value = getattr(self, name)
            ok = (_is_int(value) and low <= value < 2**31) or (value is None and name == "max_tokens")
            refuse(ok, name, value, f"an integer in [{low}, {2**31})")
        fits = self.max_tokens is None or self.min_tokens <= self.max_tokens
        refuse(fits, "min_tokens", self.min_tokens, f"<= max_tokens {self.max_tokens}")
        for name, high in (("seed", 2**63), ("logprobs", 2**31), ("prompt_logprobs", 2**31)):
            value = getattr(self, name)
            ok = value is None or (_is_int(value) and 0 <= value < high)
            refuse(ok, name, value, f"None or an integer in [0, {high})")

    def _check_numbers(self) -> None:
        checks = (
            ("temperature", lambda v: v >= 0, "a finite number >= 0"),
            ("top_p", lambda v: 0 < v <= 1, "a number in (0, 1]"),
            ("min_p", lambda v: 0 <= v <= 1, "a number in [0, 1]"),
            ("repetition_penalty", lambda v: v > 0, "a finite number > 0"),
            ("presence_penalty", lambda v: -2 <= v <= 2, "a number in [-2, 2]"),
            ("frequency_penalty", lambda v: -2 <= v <= 2, "a number in [-2, 2]"),
        )
        for name, inside, expected in checks:
            value = getattr(self, name)
            refuse(_is_number(value) and inside(value), name, value, expected)
        if self.logit_bias is None:
            return
        mapping = isinstance(self.logit_bias, Mapping)
        refuse(mapping, "logit_bias", self.logit_bias, "a mapping of token id to bias")
        entries = {plain(token): plain(bias) for token, bias in self.logit_bias.items()}
        for token, bias in entries.items():
            refuse(_is_int(token) and token >= 0, "logit_bias", token, "token ids (integers >= 0) as keys")
            refuse(_is_number(bias), f"logit_bias[{short(token)}]", bias, "a finite number")
        object.__setattr__(self, "logit_bias", entries or None)

    def _check_stops(self) -> None:
        stop = listed(self.stop)
        stop = () if stop is None else (stop,) if isinstance(stop, str) else stop
        ok = isinstance(stop, Sequence) and all(isinstance(s, str) and s for s in stop)
        refuse(ok, "stop", self.stop, "a non-empty string or a list of them")
        ids = self.stop_token_ids if self.stop_token_ids is not None else ()
        ok = isinstance(ids, Sequence) and all(_is_int(i) and i >= 0 for i in ids)
        refuse(ok, "stop_token_ids", self.stop_token_ids, "a list of token ids (integers >= 0)")
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "stop_token_ids", tuple(ids))

    @cached_property
    def level(self) -> Level:
        """The cheapest sampler level that supports these params."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)
        if penalties or self.logit_bias or self.min_tokens > 0:
            return "full"
        if self.temperature == 0:
            return "greedy_logprobs" if self.logprobs else "greedy"
        return "full" if self.logprobs else "plain"

    def filled(self, room: int) -> "SamplingParams":
        """These params, with max_tokens set to `room` (at least 1 and min_tokens) if it is None."""
        return self if self.max_tokens is not None else replace(self, max_tokens=max(1, room, self.min_tokens))

    def check(self, *, vocab_size: int, max_logprobs: int, max_logit_bias: int) -> None:
        """Checks the params against the limits of an engine.

        Args:
            vocab_size: V.
            max_logprobs: Maximum alternatives that a step returns per token.
            max_logit_bias: Maximum entries of logit_bias.

        Raises:
            RequestError: a token id outside the vocabulary, or a limit is exceeded.
        """
        for name, ids in (("logit_bias", self.logit_bias or ()), ("stop_token_ids", self.stop_token_ids)):
            for token in ids:
                refuse(token < vocab_size, name, token, f"a token id < vocab_size {vocab_size}")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            refuse((value or 0) <= max_logprobs, name, value, f"<= max_logprobs {max_logprobs} of the engine")
        entries = len(self.logit_bias or ())
        expected = f"at most max_logit_bias {max_logit_bias} of the engine"
        refuse(entries <= max_logit_bias, "logit_bias", f"{entries} entries", expected)
