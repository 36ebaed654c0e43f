"""A bucket with a limit of context gives every row the bits that one without gives it."""

from collections.abc import Callable

import numpy as np

from loquetier_jax.config import Bucket
from loquetier_jax.engine import Engine
from tests.engine.engines import BUCKETS, SERVE, add_random_adapter, greedy, random_prompt

LIMIT = 32


def test_limited_buckets_give_the_same_bits(tiny_engine: Engine, make_engine: Callable[..., Engine]):
    """Prompts and outputs on both sides of the limit, and across it."""
    rng, used = np.random.default_rng(0), set()
    limited = make_engine(buckets=(Bucket(**SERVE, context=LIMIT), *BUCKETS[:1]))
    limited.loop.on_iteration = lambda pending, _: used.update(run.key for run in pending.forward)
    prompts = [random_prompt(rng, n) for n in (3, 20, 31, 32, 33, 60)]
    found = []
    for engine in (tiny_engine, limited):
        add_random_adapter(engine, "a", 1, 8)
        found.append([])
        for several in ([0], [1, 0], [2, 3], [4, 0, 1], [5], range(6)):
            outputs = engine.generate(
                [prompts[i] for i in several], [None if i % 2 else "a" for i in several], greedy(8, logprobs=1)
            )
            found[-1] += [o.outputs[0] for o in outputs]
    for one, other in zip(*found, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == other.logprobs
    assert {name for function, name in used if function == "forward"} == {b.name for b in limited.cfg.buckets}
