"""On any device a hit of the prefix cache says what a miss says, within the tolerance of steps of another size."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from loquetier_jax.engine import Engine
from tests.engine.engines import add_random_adapter, greedy, random_prompt
from tests.tolerances import assert_close

pytestmark = pytest.mark.also_gpu


def test_a_hit_is_close_to_a_miss(tiny_engine: Engine, make_engine: Callable[..., Engine], tokenizer: Any):
    without, rng = make_engine(tokenizer=tokenizer, enable_prefix_caching=False), np.random.default_rng(0)
    chats = {None: random_prompt(rng, 60), "a": random_prompt(rng, 40)}
    for engine in (tiny_engine, without):
        add_random_adapter(engine, "a", 1)
    cached = 0
    for _ in range(3):
        for name, said in chats.items():
            params, prompt = greedy(4, logprobs=0), said + random_prompt(rng, 7)
            outs = [engine.generate([prompt], name, params)[0] for engine in (tiny_engine, without)]
            tokens = [out.outputs[0].token_ids for out in outs]
            assert tokens[0] == tokens[1]
            rows = [zip(out.outputs[0].logprobs, tokens[0], strict=True) for out in outs]
            assert_close(*([row[token].logprob for row, token in one] for one in rows), "f32_buckets")
            cached += outs[0].num_cached_tokens
            chats[name] = prompt + tokens[0]
    assert cached > 200
