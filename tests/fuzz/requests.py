"""Calls of `Engine.submit`: prompts of every form, sampling parameters, adapters, ids, tools."""

import os
import random
from pathlib import Path
from typing import Any

from loquetier_jax.errors import AdapterError, RequestError
from loquetier_jax.sampling_params import SamplingParams
from loquetier_jax.tiny.tokenizer import build_tokenizer
from tests.engine.engines import add_random_adapter, build_engine
from tests.engine.evidence import state_of
from tests.fuzz.mutate import mutate_ids, mutate_tree, python_value

IDS = [3, 4, 5, 6, 7]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
PROMPTS: tuple[Any, ...] = ("Some words", IDS, CHAT, {"prompt_token_ids": IDS}, {"prompt": "Some words"})
PARAMS: tuple[dict[str, Any], ...] = (
    {"temperature": 0, "max_tokens": 4, "ignore_eos": True},
    {"temperature": 1.0, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3, "n": 2, "max_tokens": None},
    {"stop": ["x", "yz"], "stop_token_ids": [5], "min_tokens": 1, "logit_bias": {3: 1.0, 4: -1.0}, "logprobs": 2},
    {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5, "prompt_logprobs": 1},
    {"max_new_tokens": 4, "detokenize": True, "stop_strings": "x", "do_sample": True, "num_return_sequences": 1},
)
REST = {"adapter": "a", "request_id": "mine", "tools": None, "chat_template_kwargs": None, "listener": None}
FIELDS = frozenset(SamplingParams.__dataclass_fields__) | SamplingParams.borrowed


class Requests:
    """One argument of a good call is damaged; what is accepted runs a step now and then, and is cancelled."""

    errors = (AdapterError, RequestError)

    def __init__(self, folder: Path) -> None:
        cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
        self._engine = build_engine(cache, tokenizer=build_tokenizer())  # its functions are those of tests/engine
        add_random_adapter(self._engine, "a", seed=1)

    def attempt(self, rng: random.Random) -> None:
        before, steps = state_of(self._engine), rng.random() < 0.02
        try:
            submitted = self._engine.submit(**_arguments(rng))
        except Exception:
            assert state_of(self._engine) == before, "a refusal has left its traces"
            raise
        assert all(type(i) is int and 0 <= i < self._engine.spec.vocab_size for i in submitted.requests[0].prompt_ids)
        scores = submitted.requests[0].params.prompt_logprobs is not None
        if steps or scores:
            self._engine.step()
        assert self._engine.cancel(submitted.request_id) or submitted.finished
        while (steps or scores) and self._engine.step():
            pass
        self._engine.drain()
        assert submitted.finished

    def traces(self) -> dict[str, Any]:
        """All that a request takes; steps and seeds go on."""
        state = state_of(self._engine)
        names = ("waiting", "running", "listeners", "names", "jobs", "device_jobs", "scoring")
        taken = {name: state["taken"][name] for name in ("KV pages", "slots", "train pages")}
        return {name: state[name] for name in names} | taken


def _arguments(rng: random.Random) -> dict[str, Any]:
    """Those of `submit`, where one is wrong."""
    prompt, params, rest = rng.choice(PROMPTS), rng.choice(PARAMS), dict(REST)
    kind = rng.random()
    if kind < 0.5:
        params = mutate_tree(rng, params, python_value)
    elif kind < 0.7:
        prompt = mutate_ids(rng, IDS)
    elif kind < 0.85:
        prompt = mutate_tree(rng, prompt, python_value)
    else:
        rest[rng.choice(list(rest))] = python_value(rng)
    if isinstance(params, dict):  # Python itself refuses names that are no argument
        params = SamplingParams(**{name: value for name, value in params.items() if name in FIELDS})
    return {"prompt": prompt, "params": params, **rest}
