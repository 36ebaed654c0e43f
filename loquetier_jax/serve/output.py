"""What callers receive: outputs with vLLM's names, stream pieces, and request timings."""

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of one token.

    Attributes:
        logprob: Under the model, before bias, penalties and temperature.
        rank: Rank in the vocabulary, 1 = most likely; None if not requested.
    """

    logprob: float
    rank: int | None = None


@dataclass(slots=True)
class RequestMetrics:
    """Times of one completion, in seconds on the engine's clock, and what it was spared.

    Attributes:
        arrival_time: When the request arrived.
        first_scheduled_time: When it was admitted; None before.
        token_times: When each token was read.
        finished_time: When it ended; None before.
        num_cached_tokens: Prompt tokens whose KV was found in the prefix cache; 0 before it is admitted.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    token_times: list[float] = field(default_factory=list)
    finished_time: float | None = None
    num_cached_tokens: int = 0

    @property
    def first_token_time(self) -> float | None:
        return self.token_times[0] if self.token_times else None

    @property
    def last_token_time(self) -> float | None:
        return self.token_times[-1] if self.token_times else None

    @property
    def queue_time(self) -> float | None:
        """Seconds from arrival to admission."""
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time

    @property
    def ttft(self) -> float | None:
        """Time to first token: seconds from arrival, queueing included."""
        return self.token_times[0] - self.arrival_time if self.token_times else None

    @property
    def itl(self) -> list[float]:
        """Inter-token latencies: all gaps, in seconds."""
        return [b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        """Time per output token: the mean gap, in seconds; None for fewer than two tokens."""
        n = len(self.token_times) - 1
        return (self.token_times[-1] - self.token_times[0]) / n if n > 0 else None


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt.

    Attributes:
        index: Which of the n completions.
        text: Text without stop strings, stop tokens and (if requested) special tokens; "" without a tokenizer.
        token_ids: All tokens, including the one that ended it.
        cumulative_logprob: Sum over token_ids; None unless logprobs were requested.
        logprobs: Per token {token id: Logprob}, always including the chosen token; None unless requested.
        finish_reason: "stop", "length", "abort", "error", or None while it runs.
        stop_reason: The stop string or stop id that ended it, or an error message; otherwise None.
        metrics: Its times.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    metrics: RequestMetrics

    def finished(self) -> bool:
        """Whether this completion has ended."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """All completions of one prompt.

    Attributes:
        request_id: The id given to `submit`, or the engine's own.
        prompt: The prompt text, if given as text.
        prompt_token_ids: The tokens of the prompt.
        prompt_logprobs: Per prompt token {token id: Logprob}, None for the first; None unless requested.
        outputs: One per completion.
        adapter: Name of the adapter, None for the base model.
        version: The version of the adapter it ran on.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    adapter: str | None = None
    version: int | None = None

    @property
    def finished(self) -> bool:
        """Whether all completions have ended."""
        return all(o.finished() for o in self.outputs)

    @property
    def metrics(self) -> RequestMetrics:
        """Times of the first completion."""
        return self.outputs[0].metrics

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that the first completion found in the prefix cache."""
        return self.metrics.num_cached_tokens


@dataclass(frozen=True, slots=True)
class StreamPiece:
    """The output that one step adds to one completion.

    Attributes:
        text: New text that will not change; may be empty while a character or a stop string is incomplete.
        token_ids: The new tokens.
        finish_reason: Set in the last piece.
        index: Which of the n completions.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    index: int = 0
