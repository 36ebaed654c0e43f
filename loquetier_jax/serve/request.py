"""The state of one completion, and how its tokens become output."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from loquetier_jax.sampling_params import SamplingParams
from loquetier_jax.serve.output import (
    CompletionOutput,
    FinishReason,
    Logprob,
    RequestMetrics,
    RequestOutput,
    StreamPiece,
)
from loquetier_jax.serve.prefix import Prefix
from loquetier_jax.serve.text import Detokenizer, StopChecker

Status = Literal["waiting", "running", "finished"]


@dataclass(eq=False, slots=True)
class Request:
    """One completion of one prompt (a request with n > 1 has n of these, see `make_requests`).

    The engine sets slot, kv_pages, adapter_pages, num_prefilled, num_dispatched, version, prefix and prompt_logprobs;
    tokens, text and the end of the request are handled by `accept`, `abort` and `fail`.

    Attributes:
        id: Unique in the engine.
        request_id: The id known to the caller; shared by its n completions.
        prompt_ids: Tokens of the prompt.
        params: Sampling parameters.
        seed: 32-bit seed of this completion; its random keys depend only on (seed, output index).
        adapter: Adapter name; None for the base.
        version: Id of the adapter version that it runs on.
        index: Which of the n completions.
        prompt: The prompt text, if given as text.
        cache_salt: Only requests with the same salt share KV pages with it.
        eos_token_ids: End-of-sequence ids of the model.
        slot: Index of its state on the device; None while waiting.
        kv_pages: Its KV pages, in order of position.
        adapter_pages: Pages of its adapter version; () for the base and while waiting.
        prefix: Its place in the prefix cache; None without one.
        num_prefilled: Prompt tokens dispatched, or found in the prefix cache.
        num_dispatched: Output tokens dispatched, whether read or not.
        output_ids: Output tokens read.
        token_logprobs: Log-probability of each output token.
        logprobs: Per output token {id: Logprob}; empty unless params.logprobs is set.
        prompt_logprobs: Per prompt token {id: Logprob}, None for the first; None until scored.
        text: All text released so far.
        status: "waiting", "running" or "finished".
        finish_reason, stop_reason: See CompletionOutput.
        metrics: Its times.
    """

    id: str
    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    metrics: RequestMetrics
    adapter: str | None = None
    version: Any = None
    index: int = 0
    prompt: str | None = None
    cache_salt: str | None = None
    eos_token_ids: frozenset[int] = frozenset()
    slot: int | None = None
    kv_pages: tuple[int, ...] = ()
    adapter_pages: tuple[int, ...] = ()
    prefix: Prefix | None = None
    num_prefilled: int = 0
    num_dispatched: int = 0
    output_ids: list[int] = field(default_factory=list)
    token_logprobs: list[float] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    text: str = ""
    status: Status = "waiting"
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    detokenizer: Detokenizer | None = None
    stops: StopChecker = field(default_factory=StopChecker)

    @property
    def num_tokens(self) -> int:
        """KV positions to reserve: prompt and max_tokens."""
        return len(self.prompt_ids) + self.params.max_tokens

    @property
    def num_remaining(self) -> int:
        """Prompt tokens not yet dispatched."""
        return len(self.prompt_ids) - self.num_prefilled

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """All ids that end this completion, ascending; banned on the device until min_tokens is reached."""
        eos = () if self.params.ignore_eos else self.eos_token_ids
        return tuple(sorted({*eos, *self.params.stop_token_ids}))

    def accept(
        self,
        token: int,
        logprob: float,
        alternatives: Sequence[tuple[int, float]] | None,
        now: float,
        *,
        rank: int | None = None,
    ) -> StreamPiece | None:
        """Takes the next output token.

        Args:
            token: Its id.
            logprob: Its log-probability.
            alternatives: (id, log-probability), most likely first; only the first params.logprobs are kept.
            now: When it was read, in seconds.
            rank: Rank of the token in the vocabulary, 1 = most likely.

        Returns:
            What it adds to the stream, or None if the request has already finished: the surplus token from
            dispatching one step ahead is ignored.
        """
        if self.finished:
            return None
        self.status = "running"
        self.output_ids.append(token)
        self.token_logprobs.append(logprob)
        self.metrics.token_times.append(now)
        if self.params.logprobs is not None:
            self.logprobs.append(self._logprobs_of(token, logprob, alternatives or (), rank))
        text = self._advance(token)
        self.text += text
        if self.finish_reason is not None:  # last: a thread that polls `finished` then reads all of it
            self._close(now)
        return StreamPiece(text, (token,), self.finish_reason, self.index)

    def _logprobs_of(
        self, token: int, logprob: float, alternatives: Sequence[tuple[int, float]], rank: int | None
    ) -> dict[int, Logprob]:
        kept = list(alternatives)[: self.params.logprobs]
        out = {i: Logprob(float(lp), place) for place, (i, lp) in enumerate(kept, 1)}
        out.setdefault(token, Logprob(float(logprob), rank))
        return out

    def _advance(self, token: int) -> str:
        """Checks whether `token` ends the request; returns the text to release."""
        may_stop = len(self.output_ids) > self.params.min_tokens
        if may_stop and token in self.stop_ids:
            self.finish_reason = "stop"
            eos = not self.params.ignore_eos and token in self.eos_token_ids
            self.stop_reason = None if eos else token
            return self._rest(may_stop)
        new = self.detokenizer.push(token) if self.detokenizer else ""
        text, self.stop_reason = self.stops.push(new, may_stop)
        if self.stop_reason is not None:
            self.finish_reason = "stop"
        elif len(self.output_ids) >= self.params.max_tokens:
            text += self._rest(may_stop)
            self.finish_reason = self.finish_reason or "length"
        return text

    def _rest(self, may_stop: bool) -> str:
        """Releases all text held back; its last bytes may still complete a stop string."""
        text, stop = self.stops.push(self.detokenizer.flush() if self.detokenizer else "", may_stop)
        if stop is not None:
            self.finish_reason, self.stop_reason = "stop", stop
            return text
        return text + self.stops.flush()

    def abort(self, now: float) -> StreamPiece | None:
        """Ends the request at the caller's request; returns its last piece, or None if it had finished."""
        return self._end("abort", None, now)

    def fail(self, message: str, now: float) -> StreamPiece | None:
        """Ends the request because of an error; `message` becomes its stop_reason."""
        return self._end("error", message, now)

    def _end(self, reason: FinishReason, why: str | None, now: float) -> StreamPiece | None:
        if self.finished:
            return None
        text = self._rest(may_stop=False)
        self.text += text
        self.finish_reason, self.stop_reason = reason, why
        self._close(now)
        return StreamPiece(text, (), reason, self.index)

    def _close(self, now: float) -> None:
        self.status = "finished"
        self.metrics.finished_time = now

    def completion(self) -> CompletionOutput:
        """A snapshot of the completion so far, except that `metrics` is shared and keeps changing."""
        wanted = self.params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text=self.text,
            token_ids=list(self.output_ids),
            cumulative_logprob=math.fsum(self.token_logprobs) if wanted else None,
            logprobs=list(self.logprobs) if wanted else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            metrics=self.metrics,
        )


def collect(requests: Sequence[Request]) -> RequestOutput:
    """The output of one prompt from its n requests, ordered by index."""
    first = requests[0]
    return RequestOutput(
        request_id=first.request_id,
        prompt=first.prompt,
        prompt_token_ids=list(first.prompt_ids),
        prompt_logprobs=first.prompt_logprobs if first.params.prompt_logprobs is not None else None,
        outputs=[r.completion() for r in sorted(requests, key=lambda r: r.index)],
        adapter=first.adapter,
        version=first.version,
    )
