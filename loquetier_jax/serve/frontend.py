"""The engine's request methods: submit, cancel, generate, stream."""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from loquetier_jax.config import EngineConfig
from loquetier_jax.driver import Driver
from loquetier_jax.errors import AdapterError
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.sampling_params import SamplingParams, refuse
from loquetier_jax.serve.accepted import Accepted
from loquetier_jax.serve.fits import check_fits
from loquetier_jax.serve.handle import RequestHandle
from loquetier_jax.serve.listeners import Listener
from loquetier_jax.serve.make_requests import make_requests
from loquetier_jax.serve.output import RequestOutput, StreamPiece
from loquetier_jax.serve.prompts import one_each, prompts_of
from loquetier_jax.serve.queue import RequestQueue
from loquetier_jax.serve.score_requests import ScoreRequests
from loquetier_jax.serve.scoring import Scoring
from loquetier_jax.serve.tokenizer import Prompt, encode_prompt, end_token_ids
from loquetier_jax.serve.tokenizer_type import PreTrainedTokenizerBase
from loquetier_jax.token_ids import plain_prompt


class RequestFrontend:
    """Accepts prompts and returns outputs. Thread-safe.

    Validation and tokenizing happen here, in the caller's thread and without the loop's lock, and adapters that are not
    on the device begin to be loaded by other threads. The loop receives the requests through its inbox.

    Args:
        spec, cfg, tokenizer: The engine's.
        driver: The loop's driver.
        queue, scoring: Where requests and score tasks are queued.
        scores: Creates score tasks.
        clock: The loop's clock, seconds.
        epoch: Returns the number of the last step dispatched.
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
        cache_salt: str | None = None,
        request_id: str | None = None,
        listener: Callable[[StreamPiece], None] | None = None,
    ) -> RequestHandle:
        """Queues a prompt; returns without waiting for a step.

        Args:
            prompt: Text, token ids (a list or an array), chat messages, or vLLM's {"prompt_token_ids": ids}.
            adapter: Adapter name; None is the base model.
            params: Sampling parameters.
            tools: JSON schemas of the functions that the model may call; only for chat messages.
            chat_template_kwargs: Extra template variables, e.g. {"enable_thinking": False}; only for chat messages.
            cache_salt: Only requests with the same salt share the KV of a common beginning of their prompts, so that
                nobody can find out by timing what others have asked; None is the salt of all that have none.
            request_id: Caller-chosen id; must be unique among live requests.
            listener: Called with every StreamPiece, in the thread that drives the loop, or that cancels the request. It
                may submit and cancel, which take effect after it has returned.

        Raises:
            RequestError: a prompt that is too long or refused by the chat template, bad parameters, or an id in use.
            AdapterError: an unknown adapter. Neither affects running requests.
            EngineError: a step has failed, or the engine is closed.
        """
        self._driver.check_alive()
        chat = {"tools": tools, "chat_template_kwargs": chat_template_kwargs}
        params = SamplingParams() if params is None else params
        refuse(isinstance(params, SamplingParams), "params", params, "SamplingParams")
        refuse(isinstance(request_id, (str, type(None))), "request_id", request_id, "a string or None")
        refuse(listener is None or callable(listener), "listener", listener, "a function or None")
        prompt = plain_prompt(prompt)
        ids = self._encode(prompt, **chat)
        with self._seeding:
            accepted = self._accept(prompt, ids, adapter, params, cache_salt, request_id, listener)
        self._queue_all([accepted])
        return accepted.handle

    def _encode(self, prompt: Prompt, **chat: Any) -> Sequence[int]:
        return encode_prompt(self.tokenizer, prompt, self.spec.vocab_size, **chat)

    def _accept(
        self,
        prompt: Prompt,
        ids: Sequence[int],
        adapter: str | None,
        params: SamplingParams,
        cache_salt: str | None,
        request_id: str | None = None,
        listener: Listener | None = None,
    ) -> Accepted:
        """Registers a prompt's requests; a refused prompt consumes no seed."""
        known = cache_salt is None or (isinstance(cache_salt, str) and cache_salt)
        refuse(known, "cache_salt", cache_salt, "a non-empty string or None")
        with self._seeds_kept():
            requests = make_requests(
                request_id or self._new_id(),
                ids,
                params.filled(self._room - len(ids)),
                arrival=self._clock(),
                max_model_len=self.cfg.max_model_len,
                default_seed=int(self.rng.integers(2**32)),
                adapter=adapter,
                prompt=prompt if isinstance(prompt, str) else None,
                cache_salt=cache_salt,
                tokenizer=self.tokenizer,
                eos_token_ids=end_token_ids(self.tokenizer, self.spec.eos_token_ids, self.spec.vocab_size),
            )
            check_fits(requests[0], self.cfg, self.spec, self._queue.kv, self._scores.rows)
            self._queue.announce(requests)
        accepted = Accepted(RequestHandle(requests), listener)
        try:
            if params.prompt_logprobs is not None:
                accepted.scores = self._scores.of_prompt(requests, self._queue.version(requests[0]))
        except BaseException:
            self._withdraw([accepted])
            raise
        return accepted

    @contextmanager
    def _seeds_kept(self) -> Iterator[None]:
        """Returns seeds drawn inside if what they were drawn for is refused: later requests are not affected."""
        before = self.rng.bit_generator.state
        try:
            yield
        except BaseException:
            self.rng.bit_generator.state = before
            raise

    def _queue_all(self, accepted: Sequence[Accepted]) -> None:
        """Queues prompts in one command: no step runs between the first and the last."""

        def add() -> None:
            for one in accepted:
                if one.scores is not None:
                    self._scoring.add(one.scores)
                for request in one.handle.requests:
                    self._queue.add(request, one.listener)

        try:
            for one in accepted:
                self._queue.prepare(one.handle.requests)
        except BaseException:  # Ctrl-C
            self._withdraw(accepted)
            raise
        self._driver.post(add)

    def _withdraw(self, accepted: Sequence[Accepted]) -> None:
        """Undoes `_accept` of prompts that are not queued after all."""
        for one in accepted:
            self._queue.withdraw(one.handle.requests)
            if one.scores is not None and one.scores.packs:
                one.scores.on_error(AdapterError("withdrawn"))

    @property
    def _room(self) -> int:
        """Maximum tokens of one request, prompt and output together."""
        kv = self._queue.kv
        return min(self.cfg.max_model_len, kv.num_pages * kv.page_size)

    def _new_id(self) -> str:
        """A request id not used by any live request."""
        return next(name for name in map("request-{}".format, self._ids) if not self._queue.is_live(name))

    def cancel(self, request_id: str) -> bool:
        """Ends all completions of a request before the next step is scheduled; returns whether any was live."""
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
        cache_salt: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts and waits for all of them.

        Args:
            prompts: A string, or a list of strings, token id lists or chats.
            adapter: One for all prompts, or one per prompt.
            params: Likewise.
            tools: See `submit`; shared by all prompts.
            chat_template_kwargs: Likewise.
            cache_salt: See `submit`; one for all prompts, or one per prompt.

        Returns:
            One RequestOutput per prompt, in order.

        Raises:
            RequestError, AdapterError: see `submit`; if one prompt is refused, none runs.
        """
        self._driver.check_alive()
        prompts = prompts_of(prompts, "prompts")
        adapters = one_each(adapter, len(prompts), "adapter", (str, type(None)))
        every = one_each(params, len(prompts), "params", (SamplingParams, type(None)))
        salts = one_each(cache_salt, len(prompts), "cache_salt", (str, type(None)))
        chat = {"tools": tools, "chat_template_kwargs": chat_template_kwargs}
        asked = list(zip(map(plain_prompt, prompts), adapters, every, salts, strict=True))
        handles = self._submit_all(asked, chat)
        try:
            self._driver.wait(lambda: all(h.finished for h in handles))
        except BaseException:  # their output would never be collected
            for handle in handles:
                self.cancel(handle.request_id)
            raise
        return [h.output() for h in handles]

    def _submit_all(
        self,
        asked: Sequence[tuple[Prompt, str | None, SamplingParams | None, str | None]],
        chat: Mapping[str, Any],
    ) -> list[RequestHandle]:
        """Queues all prompts or none; each with its adapter, parameters and cache salt."""
        encoded = [self._encode(prompt, **chat) for prompt, *_ in asked]
        accepted: list[Accepted] = []
        with self._seeding, self._seeds_kept():
            try:
                for ids, (prompt, name, one, salt) in zip(encoded, asked, strict=True):
                    accepted.append(self._accept(prompt, ids, name, one or SamplingParams(), salt))
            except BaseException:
                self._withdraw(accepted)
                raise
        self._queue_all(accepted)
        return [one.handle for one in accepted]

    def stream(
        self,
        prompt: Prompt,
        adapter: str | None = None,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        cache_salt: str | None = None,
    ) -> Iterator[StreamPiece]:
        """Queues a prompt and yields its output piece by piece; closing the iterator early cancels the request.

        Raises:
            RequestError, AdapterError: see `submit`; raised by this call, not at the first piece.
        """
        pieces: deque[StreamPiece] = deque()
        more = {"tools": tools, "chat_template_kwargs": chat_template_kwargs, "cache_salt": cache_salt}
        return self._pieces(self.submit(prompt, adapter, params, **more, listener=pieces.append), pieces)

    def _pieces(self, handle: RequestHandle, pieces: deque[StreamPiece]) -> Iterator[StreamPiece]:
        try:
            while pieces or not handle.finished:
                if not pieces:
                    self._driver.wait(lambda: bool(pieces) or handle.finished)
                while pieces:
                    yield pieces.popleft()
        finally:
            self.cancel(handle.request_id)

    def reset_prefix_cache(self) -> None:
        """Empties the prefix cache; running requests are not affected."""
        with self._driver.entered():
            self._queue.kv.clear_cache()
