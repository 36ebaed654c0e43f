"""The calls about requests: submit, cancel, generate, stream, log_probs."""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from loquetier_jax.batch.segments import MAX_BANNED
from loquetier_jax.config import EngineConfig
from loquetier_jax.errors import AdapterError, RequestError
from loquetier_jax.faces.arguments import one_each, prompts_of
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.runtime.loop import Loop
from loquetier_jax.runtime.score_requests import ScoreRequests, prompt_logprobs
from loquetier_jax.schedule.admission import decode_limits
from loquetier_jax.serve.output import RequestOutput, StreamPiece
from loquetier_jax.serve.params import SamplingParams, refuse
from loquetier_jax.serve.request import Request, collect, make_requests
from loquetier_jax.serve.tokenizer import Prompt, encode_prompt, end_token_ids
from loquetier_jax.token_ids import plain_prompt


@dataclass
class Submitted:
    """A prompt on its way: its n requests."""

    requests: list[Request]

    @property
    def request_id(self) -> str:
        return self.requests[0].request_id

    @property
    def finished(self) -> bool:
        """Whether every completion has ended and prompt log-probs, if wanted, are there."""
        first = self.requests[0]
        scored = first.params.prompt_logprobs is None or first.prompt_logprobs is not None
        aborted = first.finish_reason in ("abort", "error")
        return all(r.finished for r in self.requests) and (scored or aborted)

    def output(self) -> RequestOutput:
        """The output so far."""
        return collect(self.requests)


class RequestCalls:
    """Part of Engine."""

    spec: DecoderSpec
    cfg: EngineConfig
    tokenizer: PreTrainedTokenizerBase | None
    loop: Loop
    wait: Callable[[Callable[[], bool]], None]
    _check_alive: Callable[[], None]
    _lock: Any
    _entered: Callable[[], AbstractContextManager[None]]
    _changed: threading.Condition
    _ids: "itertools.count[int]"
    _rng: np.random.Generator
    _scores: ScoreRequests

    def submit(
        self,
        prompt: Prompt,
        adapter: str | None = None,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        request_id: str | None = None,
        listener: Callable[[StreamPiece], None] | None = None,
    ) -> Submitted:
        """Queues a prompt; returns at once.

        Args:
            prompt: Text, token ids (a list or an array), chat messages, or vLLM's {"prompt_token_ids": ids}.
            adapter: Name; None is the base model.
            params: How to sample.
            tools: JSON schemas of the functions that the model may call; for chat messages, as is the next.
            chat_template_kwargs: Further variables of the chat template, e.g. {"enable_thinking": False}.
            request_id: The caller's name for it; unique among live requests.
            listener: Called with every StreamPiece, from whatever drives the loop.

        Raises:
            RequestError: a prompt that cannot fit or that the chat template refuses, bad parameters, an id in use.
            AdapterError: an unknown adapter. In both cases running requests do not notice.
            EngineError: a step has failed before, or the engine was closed.
        """
        self._check_alive()
        params = SamplingParams() if params is None else params
        refuse(isinstance(params, SamplingParams), "params", params, "SamplingParams")
        refuse(isinstance(request_id, (str, type(None))), "request_id", request_id, "some text or None")
        refuse(listener is None or callable(listener), "listener", listener, "a function or None")
        prompt = plain_prompt(prompt)
        with self._entered(), self._seeds_kept():
            chat = {"tools": tools, "chat_template_kwargs": chat_template_kwargs}
            ids = encode_prompt(self.tokenizer, prompt, self.spec.vocab_size, **chat)
            request_id = request_id or self._new_id()
            requests = make_requests(
                request_id,
                ids,
                params.filled(self._room - len(ids)),
                arrival=self.loop.clock(),
                max_model_len=self.cfg.max_model_len,
                default_seed=int(self._rng.integers(2**32)),
                adapter=adapter,
                prompt=prompt if isinstance(prompt, str) else None,
                tokenizer=self.tokenizer,
                eos_token_ids=end_token_ids(self.tokenizer, self.spec.eos_token_ids, self.spec.vocab_size),
            )
            self._check(requests)
            submitted = Submitted(requests)
            if params.prompt_logprobs is not None:
                self._score_prompt(submitted, ids, adapter, params.prompt_logprobs)
            for request in requests:
                self.loop.serving.add(request, listener)
            self._changed.notify_all()
        return submitted

    @property
    def _room(self) -> int:
        """Most tokens of one request, prompt and output together."""
        kv = self.loop.serving.kv
        return min(self.cfg.max_model_len, kv.num_pages * kv.page_size)

    def _new_id(self) -> str:
        """One that no caller has given to a live request."""
        return next(name for name in map("request-{}".format, self._ids) if not self.loop.serving.is_live(name))

    @contextmanager
    def _seeds_kept(self) -> Iterator[None]:
        """Gives seeds drawn inside back when what they were drawn for is refused: later requests do not notice."""
        before = self._rng.bit_generator.state
        try:
            yield
        except BaseException:
            self._rng.bit_generator.state = before
            raise

    def _score_prompt(self, submitted: Submitted, ids: Sequence[int], adapter: str | None, count: int) -> None:
        def done(scores: list[dict[str, np.ndarray]]) -> None:
            result = prompt_logprobs(ids, scores[0], count) if scores else [None]
            for request in submitted.requests:
                request.prompt_logprobs = result

        # Without its adapter's weights the request itself ends with that error, so nobody waits for these scores.
        task = self._scores.task([ids] if len(ids) > 1 else [], adapter, done, on_error=lambda error: None)
        self.loop.scoring.add(task)

    def cancel(self, request_id: str) -> bool:
        """Ends all completions of a request at once; returns whether any was alive."""
        with self._lock:
            serving = self.loop.serving
            live = serving.completions(request_id)
            for request in live:
                serving.cancel(request.id, self.loop.clock(), self.loop.epoch)
            self._changed.notify_all()
        return bool(live)

    def generate(
        self,
        prompts: Sequence[Prompt] | str,
        adapter: str | Sequence[str | None] | None = None,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts and waits for all of them.

        Args:
            prompts: One text, or a list of texts, token id lists or chats.
            adapter: One for all, or one per prompt.
            params: Likewise.
            tools: See `submit`; the same for all.
            chat_template_kwargs: Likewise.

        Returns:
            One RequestOutput per prompt, in order.

        Raises:
            RequestError, AdapterError: see `submit`; none of the prompts is run then.
        """
        prompts = prompts_of(prompts, "prompts")
        adapters = one_each(adapter, len(prompts), "adapter", (str, type(None)))
        every = one_each(params, len(prompts), "params", (SamplingParams, type(None)))
        chat = {"tools": tools, "chat_template_kwargs": chat_template_kwargs}
        submitted: list[Submitted] = []
        with self._entered(), self._seeds_kept():  # no step between them: all are accepted, or none has run
            try:
                for prompt, name, one in zip(prompts, adapters, every, strict=True):
                    submitted.append(self.submit(prompt, name, one, **chat))
            except Exception:
                for one in submitted:
                    self.cancel(one.request_id)
                raise
        try:
            self.wait(lambda: all(s.finished for s in submitted))
        except BaseException:  # nobody would ever fetch them
            for one in submitted:
                self.cancel(one.request_id)
            raise
        return [s.output() for s in submitted]

    def stream(
        self,
        prompt: Prompt,
        adapter: str | None = None,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Iterator[StreamPiece]:
        """Queues a prompt and yields its output piece by piece; leaving the iteration early cancels the request.

        Raises:
            RequestError, AdapterError: see `submit`; at once, not at the first piece.
        """
        pieces: deque[StreamPiece] = deque()
        chat = {"tools": tools, "chat_template_kwargs": chat_template_kwargs}
        return self._pieces(self.submit(prompt, adapter, params, **chat, listener=pieces.append), pieces)

    def _pieces(self, submitted: Submitted, pieces: deque[StreamPiece]) -> Iterator[StreamPiece]:
        try:
            while pieces or not submitted.finished:
                if not pieces:
                    self.wait(lambda: bool(pieces) or submitted.finished)
                while pieces:
                    yield pieces.popleft()
        finally:
            self.cancel(submitted.request_id)

    def log_probs(self, sequences: Sequence[Prompt] | str, adapter: str | None = None) -> list[np.ndarray]:
        """f32 [n - 1] log-probs of each sequence's tokens after the first, by the training forward's own code.

        One text is a list of one sequence, as for `generate`.

        Raises:
            RequestError: a sequence of one token, or longer than a score pack.
            AdapterError: an unknown adapter, or one whose weights cannot be read.
        """
        sequences = prompts_of(sequences, "sequences")
        result: list[np.ndarray] = []
        errors: list[AdapterError] = []
        finished = threading.Event()

        def done(scores: list[dict[str, np.ndarray]]) -> None:
            result.extend(s["logp"] for s in scores)
            finished.set()

        def failed(error: AdapterError) -> None:
            errors.append(error)
            finished.set()

        with self._entered():
            ids = [encode_prompt(self.tokenizer, s, self.spec.vocab_size) for s in sequences]
            self.loop.scoring.add(self._scores.task(ids, adapter, done, failed))
            self._changed.notify_all()
        self.wait(finished.is_set)
        if errors:
            raise errors[0]
        return result

    def _check(self, requests: Sequence[Request]) -> None:
        """Refuses what this engine cannot run, before anything is queued."""
        request, cfg, params = requests[0], self.cfg, requests[0].params
        in_use = any(self.loop.serving.is_live(r.id) for r in requests)
        refuse(not in_use, "request_id", request.request_id, "an id that no live request has")
        pages, room = self.loop.serving.kv.pages_for(request.num_tokens), self.loop.serving.kv.num_pages
        refuse(pages <= room, "prompt", f"{request.num_tokens} tokens with max_tokens ({pages} KV pages)", f"<= {room}")
        params.check(
            vocab_size=self.spec.vocab_size, max_logprobs=cfg.max_logprobs, max_logit_bias=cfg.max_logit_bias
        )
        held = len(request.stop_ids) if params.min_tokens else 0
        refuse(held <= MAX_BANNED, "stop_token_ids", f"{held} ids with min_tokens", f"<= {MAX_BANNED}")
        levels = {b.sampling for b in cfg.buckets if b.decode}
        limits = decode_limits(tuple(b for b in cfg.buckets if not b.packs))
        level, expected = f"sampling level {params.level!r}", f"at most that of the buckets: {sorted(levels)}"
        refuse(limits[params.level] > 0, "params", level, expected)
        if params.prompt_logprobs is not None and len(request.prompt_ids) - 1 > self._scores.rows:
            raise RequestError(
                f"prompt_logprobs: got a prompt of {len(request.prompt_ids)} tokens, expected at most "
                f"{self._scores.rows + 1} (the largest score bucket)"
            )
