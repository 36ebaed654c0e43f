"""One truth per number at the head: samplers say of a row what scoring says of it, to the last bit (f32, XLA CPU)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loquetier_jax.batch.rows import empty_sample, ravel, shapes_of
from loquetier_jax.presets import engine_config
from loquetier_jax.sampling_params import LEVELS
from loquetier_jax.step import sample
from loquetier_jax.step.head import score_rows
from loquetier_jax.step.state import head_params
from pallas_kernels.common import cpu_bits
from tests.engine.engines import SERVE
from tests.step.cases import World, make_world

pytestmark = pytest.mark.bits

SCORED = 192  # rows of a score pack, in chunks of 64 (`logit_chunk`)
OWN = SERVE["decode"] + SERVE["chunks"]  # of most engines in these tests
SIZES = sorted({1, 9, 63, 64, 65, OWN, *(n for name in ("cpu", "gpu") for n in engine_config(name).sample_sizes)})
QUICK = {(OWN, "greedy"), (OWN, "full")}


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


@pytest.fixture(scope="module")
def score(world: World) -> Callable[..., Any]:
    """(head, x [SCORED, D], targets) -> what scoring says, compiled as an engine compiles it."""
    cfg = world.cfg
    f = functools.partial(score_rows, world.spec, limit=cfg.logit_chunk, top=cfg.max_logprobs)
    x, targets = np.zeros((SCORED, world.spec.hidden_size), np.float32), np.zeros(SCORED, np.int32)
    arguments = shapes_of((head_params(world.state.params), x, targets))
    return jax.jit(f).lower(*arguments).compile(cpu_bits.compiler_options())


def drawn(world: World, rows: int, level: str, x: np.ndarray) -> dict[str, np.ndarray]:
    """What the compiled sampler says of x, every other row sampled at a temperature."""
    rng, params = np.random.default_rng(rows), empty_sample(rows, world.cfg)
    params.seed[:] = rng.integers(0, 2**32, rows)
    params.temperature[::2] = rng.uniform(0.5, 1.5, rows)[::2]
    params.repetition_penalty[:] = rng.uniform(0.8, 1.3, rows)
    params.bias_ids[:, 0], params.bias[:, 0] = rng.integers(0, 272, rows), 3.0
    out = world.state.sample(world.functions.sampler(rows, level), jnp.asarray(x), jnp.asarray(ravel(params)))
    return {name: np.asarray(a) for name, a in out.items()}


def check(world: World, score: Callable[..., Any], rows: int, level: str) -> None:
    """Scoring the same hidden states and the drawn tokens, at other places of another shape, gives the same bits."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(rows, world.spec.hidden_size)).astype(np.float32)
    said = drawn(world, rows, level, x)
    more = {"top_ids", "top_logp", "rank"} if level in ("greedy_logprobs", "full") else set()
    assert set(said) == {"tokens", "logprob"} | more
    where = rng.permutation(SCORED)[:rows]
    around, targets = rng.normal(size=(SCORED, x.shape[1])).astype(np.float32), np.zeros(SCORED, np.int32)
    around[where], targets[where] = x, said["tokens"]
    scored = score(head_params(world.state.params), jnp.asarray(around), jnp.asarray(targets))
    for name, other in {"logprob": "logp", "top_ids": "top_ids", "top_logp": "top_logp", "rank": "rank"}.items():
        if name in said:
            np.testing.assert_array_equal(said[name], np.asarray(scored[other])[where], err_msg=name)


@pytest.mark.parametrize(
    ("rows", "level"),
    [
        pytest.param(rows, level, marks=() if (rows, level) in QUICK else pytest.mark.slow)
        for rows in SIZES
        for level in LEVELS
    ],
)
def test_every_sampler_says_what_scoring_says(world: World, score: Callable[..., Any], rows: int, level: str) -> None:
    check(world, score, rows, level)


def test_a_head_of_its_own_would_be_seen(
    world: World, score: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that sums over the two halves of hidden_size, one after the other, is off by units in the last place."""
    whole = sample.distribution

    def halves(spec: Any, params: Any, x: Any) -> Any:
        said, weights = whole(spec, params, x), params["norm"]
        first = jnp.arange(len(weights)) < len(weights) // 2
        parts = [whole(spec, {**params, "norm": jnp.where(half, weights, 0)}, x).logits for half in (first, ~first)]
        z = sum(parts)
        best = z.max(axis=-1)
        return said.replace(logits=z, best=best, total=jnp.log(jnp.exp(z - best[:, None]).sum(axis=-1)))

    monkeypatch.setattr(sample, "distribution", halves)
    with pytest.raises(AssertionError, match="logprob"):
        check(world, score, OWN - 1, "greedy")
