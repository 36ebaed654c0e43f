"""The calls about requests: submit, cancel, generate, stream."""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from loquetier_jax.batch.rows import MAX_BANNED
from loquetier_jax.config import EngineConfig
from loquetier_jax.driver import Driver
from loquetier_jax.errors import RequestError
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.sampling_params import SamplingParams, refuse
from loquetier_jax.schedule.admission import decode_limit
from loquetier_jax.serve.handle import RequestHandle
from loquetier_jax.serve.output import RequestOutput, StreamPiece
from loquetier_jax.serve.prompts import one_each, prompts_of
from loquetier_jax.serve.queue import Listener, RequestQueue
from loquetier_jax.serve.request import Request, make_requests
from loquetier_jax.serve.score_requests import ScoreRequests, prompt_logprobs
from loquetier_jax.serve.scoring import ScoreTask, Scoring
from loquetier_jax.serve.tokenizer import Prompt, encode_prompt, end_token_ids
from loquetier_jax.token_ids import plain_prompt


class RequestFrontend:
    """Takes prompts in and hands outputs out; in any thread.

    What can be refused is refused here, in the caller's thread and without the loop's lock; tokenizing and reading an
    adapter's weights happen here, too. The loop finds a request that is ready to run in its inbox.

    Args:
        spec, cfg, tokenizer: Of the engine.
        driver: Of its loop.
        queue, scoring: Where requests and score tasks go.
        scores: Makes those tasks.
        clock: Seconds, the loop's.
        epoch: Gives the last step dispatched.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        cfg: EngineConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        driver: Driver,
        queue: RequestQueue,
        scoring: Scoring,
        scores: ScoreRequests,
        clock: Callable[[], float],
        epoch: Callable[[], int],
    ) -> None:
        self.spec, self.cfg, self.tokenizer, self._driver = spec, cfg, tokenizer, driver
        self._queue, self._scoring, self._scores = queue, scoring, scores
        self._clock, self._epoch = clock, epoch
        self._ids = itertools.count()
        self.rng = np.random.default_rng(cfg.seed)
        self._seeding = threading.Lock()  # seeds are drawn in the order in which prompts are accepted

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
    ) -> RequestHandle:
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
        self._driver.check_alive()
        chat = {"tools": tools, "chat_template_kwargs": chat_template_kwargs}
        params = SamplingParams() if params is None else params
        refuse(isinstance(params, SamplingParams), "params", params, "SamplingParams")
        refuse(isinstance(request_id, (str, type(None))), "request_id", request_id, "some text or None")
        refuse(listener is None or callable(listener), "listener", listener, "a function or None")
        prompt = plain_prompt(prompt)
        ids = self._encode(prompt, **chat)
        with self._seeding:
            handle, adds = self._accept(prompt, ids, adapter, params, request_id, listener)
        self._queue.prepare(handle.requests)
        self._driver.post(adds)
        return handle

    def _encode(self, prompt: Prompt, **chat: Any) -> Sequence[int]:
        return encode_prompt(self.tokenizer, prompt, self.spec.vocab_size, **chat)

    def _accept(
        self,
        prompt: Prompt,
        ids: Sequence[int],
        adapter: str | None,
        params: SamplingParams,
        request_id: str | None = None,
        listener: Listener | None = None,
    ) -> tuple[RequestHandle, Callable[[], None]]:
        """A prompt that was accepted, and the command that queues it; refused, it has drawn no seed."""
        before = self.rng.bit_generator.state
        try:
            requests = make_requests(
                request_id or self._new_id(),
                ids,
                params.filled(self._room - len(ids)),
                arrival=self._clock(),
                max_model_len=self.cfg.max_model_len,
                default_seed=int(self.rng.integers(2**32)),
                adapter=adapter,
                prompt=prompt if isinstance(prompt, str) else None,
                tokenizer=self.tokenizer,
                eos_token_ids=end_token_ids(self.tokenizer, self.spec.eos_token_ids, self.spec.vocab_size),
            )
            self._check(requests)
            self._queue.announce(requests)
        except BaseException:
            self.rng.bit_generator.state = before
            raise
        handle = RequestHandle(requests)
        task = self._prompt_scores(handle, ids, adapter, params.prompt_logprobs)

        def adds() -> None:
            if task is not None:
                self._scoring.add(task)
            for request in requests:
                self._queue.add(request, listener)

        return handle, adds

    @property
    def _room(self) -> int:
        """Most tokens of one request, prompt and output together."""
        kv = self._queue.kv
        return min(self.cfg.max_model_len, kv.num_pages * kv.page_size)

    def _new_id(self) -> str:
        """One that no caller has given to a live request."""
        return next(name for name in map("request-{}".format, self._ids) if not self._queue.is_live(name))

    def _prompt_scores(
        self, handle: RequestHandle, ids: Sequence[int], adapter: str | None, count: int | None
    ) -> ScoreTask | None:
        """The task that fills in prompt_logprobs; None where they are not wanted."""
        if count is None:
            return None

        def done(scores: list[dict[str, np.ndarray]]) -> None:
            result = prompt_logprobs(ids, scores[0], count) if scores else [None]
            for request in handle.requests:
                request.prompt_logprobs = result

        # Without its adapter's weights the request itself ends with that error, so nobody waits for these scores.
        return self._scores.task([ids] if len(ids) > 1 else [], adapter, done, on_error=lambda error: None)

    def cancel(self, request_id: str) -> bool:
        """Ends all completions of a request, before the next step is decided; returns whether any was alive."""
        live = self._queue.completions(request_id)

        def ends() -> None:
            for request in live:
                self._queue.cancel(request, self._clock(), self._epoch())

        if live:
            self._driver.post(ends)
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
        self._driver.check_alive()
        prompts = prompts_of(prompts, "prompts")
        adapters = one_each(adapter, len(prompts), "adapter", (str, type(None)))
        every = one_each(params, len(prompts), "params", (SamplingParams, type(None)))
        chat = {"tools": tools, "chat_template_kwargs": chat_template_kwargs}
        handles = self._submit_all([plain_prompt(p) for p in prompts], adapters, every, chat)
        try:
            self._driver.wait(lambda: all(h.finished for h in handles))
        except BaseException:  # nobody would ever fetch them
            for handle in handles:
                self.cancel(handle.request_id)
            raise
        return [h.output() for h in handles]

    def _submit_all(
        self,
        prompts: Sequence[Prompt],
        adapters: Sequence[str | None],
        every: Sequence[SamplingParams | None],
        chat: Mapping[str, Any],
    ) -> list[RequestHandle]:
        """All of them, or none: no step runs between the first and the last."""
        encoded = [self._encode(prompt, **chat) for prompt in prompts]
        ready: list[tuple[RequestHandle, Callable[[], None]]] = []
        with self._seeding:
            before = self.rng.bit_generator.state
            try:
                for prompt, ids, name, one in zip(prompts, encoded, adapters, every, strict=True):
                    ready.append(self._accept(prompt, ids, name, one or SamplingParams()))
            except BaseException:
                self.rng.bit_generator.state = before
                self._queue.withdraw([r for handle, _ in ready for r in handle.requests])
                raise
        for handle, _ in ready:
            self._queue.prepare(handle.requests)
        self._driver.post(lambda: [adds() for _, adds in ready] and None)
        return [handle for handle, _ in ready]

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

    def _pieces(self, handle: RequestHandle, pieces: deque[StreamPiece]) -> Iterator[StreamPiece]:
        try:
            while pieces or not handle.finished:
                if not pieces:
                    self._driver.wait(lambda: bool(pieces) or handle.finished)
                while pieces:
                    yield pieces.popleft()
        finally:
            self.cancel(handle.request_id)

    def _check(self, requests: Sequence[Request]) -> None:
        """Refuses what this engine cannot run, before anything is queued."""
        request, cfg, params = requests[0], self.cfg, requests[0].params
        pages, room = self._queue.kv.pages_for(request.num_tokens), self._queue.kv.num_pages
        refuse(pages <= room, "prompt", f"{request.num_tokens} tokens with max_tokens ({pages} KV pages)", f"<= {room}")
        params.check(
            vocab_size=self.spec.vocab_size, max_logprobs=cfg.max_logprobs, max_logit_bias=cfg.max_logit_bias
        )
        held = len(request.stop_ids) if params.min_tokens else 0
        refuse(held <= MAX_BANNED, "stop_token_ids", f"{held} ids with min_tokens", f"<= {MAX_BANNED}")
        always = tuple(b for b in cfg.buckets if not b.packs)
        expected = "prefill and decode rows in buckets without training packs"
        refuse(decode_limit(always) > 0, "buckets", [b.name for b in always], expected)
        if params.prompt_logprobs is not None and len(request.prompt_ids) - 1 > self._scores.rows:
            raise RequestError(
                f"prompt_logprobs: got a prompt of {len(request.prompt_ids)} tokens, expected at most "
                f"{self._scores.rows + 1} (the largest score bucket)"
            )
