"""The prefix cache in an engine: a hit has the bits of a miss, and nobody finds what is not theirs."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import loquetier_jax.runtime.loop as loop_module
from loquetier_jax.config import Bucket
from loquetier_jax.engine import Engine
from loquetier_jax.errors import ConfigError, RequestError
from loquetier_jax.sampling_params import SamplingParams
from loquetier_jax.serve.kv import KVPages
from loquetier_jax.serve.output import RequestOutput
from tests.engine.engines import SERVE, greedy, random_data, random_prompt, reset
from tests.engine.evidence import LORA, numbers_of, prompts, quick
from tests.engine.traffic import busy_engine
from tests.step.cases import random_adapter

pytestmark = pytest.mark.bits

PAGE = 16


@pytest.fixture(scope="module")
def without(make_engine: Callable[..., Engine], tokenizer: Any) -> Engine:
    """An engine that caches nothing: what it says is what everybody is to say."""
    return make_engine(tokenizer=tokenizer, enable_prefix_caching=False)


def common(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences begin with."""
    return next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))


class Told:
    """An engine that is asked one thing after the other by the base or one adapter, and all it has computed so far."""

    def __init__(self, engine: Engine, adapter: str | None = None) -> None:
        self.engine, self.adapter = engine, adapter
        self.asked: list[tuple[list[int], SamplingParams]] = []
        self.outs: list[RequestOutput] = []
        self.seen: list[list[int]] = []

    def ask(self, prompt: list[int], params: SamplingParams | None = None) -> RequestOutput:
        """The output; checks the number of tokens found against everything computed before."""
        self.asked.append((prompt, params or greedy(3, logprobs=0)))
        [out] = self.engine.generate([prompt], self.adapter, self.asked[-1][1])
        found = max((common(one, prompt) // PAGE for one in self.seen), default=0)
        assert out.num_cached_tokens == PAGE * min(found, (len(prompt) - 1) // PAGE)
        self.engine.check_integrity()
        self.seen.append([*prompt, *out.outputs[0].token_ids][:-1])  # the last one was never fed
        self.outs.append(out)
        return out

    def check(self, without: Engine) -> None:
        """All bits are those of an engine without a cache, which is asked everything at once."""
        asked, params = zip(*self.asked, strict=True)
        want = without.generate(asked, self.adapter, params)
        assert numbers_of(self.outs) == numbers_of(want)
        assert [out.outputs[0].text for out in self.outs] == [out.outputs[0].text for out in want]
        assert not any(out.num_cached_tokens for out in want)


def chunks_of(most: int) -> Callable[..., Any]:
    """A policy whose chunks end anywhere."""
    decide = loop_module.decide

    def cut(*args: Any) -> Any:
        decision = decide(*args)
        return replace(decision, prefill=tuple((name, min(count, most)) for name, count in decision.prefill))

    return cut


@pytest.mark.parametrize("chunk", [48, 11])
def test_a_hit_has_the_bits_of_a_miss(tiny_engine, without, monkeypatch, chunk):
    """Prompts that share a part, down to the token before and after a page; then chats, whose answers are found too."""
    monkeypatch.setattr(loop_module, "decide", chunks_of(chunk))
    told, rng = Told(tiny_engine), np.random.default_rng(chunk)
    whole = random_prompt(rng, 100)
    for shared, own in ((100, 0), (100, 0), (96, 0), (97, 0), (15, 3), (16, 1), (17, 20), (47, 2), (64, 36), (0, 40)):
        told.ask(whole[:shared] + random_prompt(rng, own))
    chat = whole[:30]
    for length in (21, 7, 10):
        said = told.ask(chat + random_prompt(rng, length), greedy(13, logprobs=0))
        chat = said.prompt_token_ids + said.outputs[0].token_ids
    told.check(without)
    assert sum(len(one) for one in told.seen) < tiny_engine.cfg.kv_pages * PAGE, "nothing was evicted"


def chat_over_page_ends(engine: Engine, without: Engine) -> None:
    """A chat whose first answer ends with a page: its last token was never fed, so the page is not full."""
    told, rng = Told(engine), np.random.default_rng(11)
    said = told.ask(random_prompt(rng, 12), greedy(4, logprobs=0))
    told.ask(said.prompt_token_ids + said.outputs[0].token_ids + random_prompt(rng, 3))
    told.check(without)


def test_a_page_is_full_when_its_last_token_was_fed(tiny_engine, without):
    chat_over_page_ends(tiny_engine, without)


def test_a_token_that_was_not_fed_would_be_seen(tiny_engine, without, monkeypatch):
    enter = KVPages.enter
    monkeypatch.setattr(KVPages, "enter", lambda self, prefix, pages, p, out: enter(self, prefix, pages, p, [*out, 0]))
    with pytest.raises(AssertionError):
        chat_over_page_ends(tiny_engine, without)


def test_what_else_a_request_asks_for_is_not_changed_by_a_hit(tiny_engine, without):
    """Penalties count the whole prompt; seeds, stops and min_tokens follow positions of the output.

    What is said next finds the tokens up to a stop, and nothing that was computed ahead of it.
    """
    rng = np.random.default_rng(1)
    told, prompt = Told(tiny_engine), random_prompt(rng, 70)
    told.ask(prompt)
    some = tuple(range(3, 200))
    for params in (
        {"repetition_penalty": 1.5, "presence_penalty": 0.5, "temperature": 0},
        {"frequency_penalty": 1.0, "seed": 5},
        {"seed": 7, "top_p": 0.9, "top_k": 40},
        {"seed": 8, "stop_token_ids": some[:16], "min_tokens": 3},
        {"seed": 9, "stop_token_ids": some, "ignore_eos": False},
        {"seed": 10, "stop": list("abcdefghijklmnopqrstuvwxyz 0123456789")},
    ):
        rest = {"max_tokens": 12, "logprobs": 0, "ignore_eos": True}
        said = told.ask(prompt + random_prompt(rng, 9), SamplingParams(**(rest | params)))
        told.ask(said.prompt_token_ids + said.outputs[0].token_ids + random_prompt(rng, 9))
    told.check(without)
    assert [out.outputs[0].finish_reason for out in told.outs[-4::2]] == ["stop"] * 2


def add(engine: Engine, name: str, seed: int) -> None:
    shape, weights = random_adapter(engine.spec, seed, 8)
    engine.add_adapter(name, weights, shape, replace=True)


def check_apart(engine: Engine, without: Engine) -> None:
    """The same prompt of everybody: adapters, versions, salts, the base."""
    prompt = random_prompt(np.random.default_rng(2), 50)
    params = greedy(4, logprobs=0)

    def ask(adapter: str | None = None, salt: str | None = None) -> int:
        [out], [want] = (e.generate([prompt], adapter, params, cache_salt=salt) for e in (engine, without))
        assert numbers_of([out]) == numbers_of([want]), "bits have changed"
        return out.num_cached_tokens

    for e in (engine, without):
        add(e, "a", 1)
        add(e, "b", 2)
    people = [(None, None), ("a", None), ("b", None), (None, "x"), (None, "y"), ("a", "x")]
    assert [ask(*who) for who in people] == [0] * 6, "somebody found what is not theirs"
    assert [ask(*who) for who in people] == [48] * 6
    for e in (engine, without):
        add(e, "a", 3)
        e.rename_adapter("b", "c")
    assert [ask("a"), ask("a", "x"), ask("c"), ask("a")] == [0, 0, 48, 48], "versions are not names"
    for e in (engine, without):
        e.unload_adapter("a")
        add(e, "a", 1)
    assert ask("a") == 0, "the same weights, loaded again, are another version"


def test_nobody_finds_what_is_not_theirs(tiny_engine, without):
    check_apart(tiny_engine, without)
    cached = tiny_engine.loop.serving.kv.num_cached
    for name in ("a", "c"):
        tiny_engine.unload_adapter(name)
    tiny_engine.generate([[5]], None, greedy(2))
    left = cached - tiny_engine.loop.serving.kv.num_cached
    assert left == 2 * 3, "pages of versions that are gone are given back"


@pytest.mark.parametrize("part", [0, 1], ids=["version", "salt"])
def test_a_key_without_version_or_salt_would_be_seen(tiny_engine, without, monkeypatch, part):
    prefix = KVPages.prefix

    def careless(self, ids, scope, *, reads=True):
        return prefix(self, ids, tuple(None if i == part else one for i, one in enumerate(scope)), reads=reads)

    monkeypatch.setattr(KVPages, "prefix", careless)
    with pytest.raises(AssertionError, match=r"bits|not theirs"):
        check_apart(tiny_engine, without)
    reset(without)


@pytest.mark.slow  # a version like any other
def test_a_published_version_starts_anew(tiny_engine):
    """The job trains on in pages of its own; a version's are read by its requests alone."""
    engine, prompt = tiny_engine, random_prompt(np.random.default_rng(3), 40)
    job = engine.finetune("job", random_data(0), lora=LORA, train=quick(max_steps=10_000, learning_rate=1e-2))
    found = []
    for step in (2, 4, 6):
        engine.wait(lambda step=step: job.step >= step)
        job.publish()
        outs = [engine.generate([prompt], "job", greedy(5, logprobs=0))[0] for _ in range(2)]
        assert numbers_of(outs[:1]) == numbers_of(outs[1:])
        found.append([out.num_cached_tokens for out in outs])
    assert found == [[0, 32]] * 3
    job.cancel()


def test_completions_of_one_prompt_share_it(tiny_engine, without):
    """One computes the prompt, the others wait for it; each says what it says where nothing is shared."""
    params = SamplingParams(n=4, seed=3, max_tokens=6, logprobs=0, ignore_eos=True)
    for length, shared in ((100, 96), (33, 32), (16, 0), (5, 0)):
        prompt = random_prompt(np.random.default_rng(length), length)
        [out], [want] = (e.generate([prompt], None, params) for e in (tiny_engine, without))
        assert [(o.token_ids, o.logprobs) for o in out.outputs] == [(o.token_ids, o.logprobs) for o in want.outputs]
        assert [o.metrics.num_cached_tokens for o in out.outputs] == [0] + 3 * [shared]
    one = replace(params, max_tokens=1)
    out = tiny_engine.generate([prompts(9, 100)[0]], None, one)[0]
    assert [o.metrics.num_cached_tokens for o in out.outputs] == [0] + 3 * [96], "the first one had ended"


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_siblings_go_on_without_the_first(tiny_engine, steps):
    """It is cancelled while it is queued, in the middle of its prompt, and after it."""
    engine = tiny_engine
    prompt = random_prompt(np.random.default_rng(4), 110)
    handle = engine.submit(prompt, None, SamplingParams(n=3, seed=3, max_tokens=5, ignore_eos=True))
    for _ in range(steps):
        engine.step()
    engine.loop.serving.cancel(handle.requests[0], engine.loop.clock(), engine.loop.epoch)
    while not handle.finished:
        assert engine.step()
        engine.check_integrity()
    assert [o.finish_reason for o in handle.output().outputs] == ["abort", "length", "length"]
    assert handle.output().outputs[2].metrics.num_cached_tokens == 96


def sick(engine: Engine, name: str) -> None:
    shape, weights = random_adapter(engine.spec, 7, 8)
    engine.add_adapter(name, jax.tree.map(lambda a: np.full_like(a, np.nan), weights), shape, replace=True)


def test_what_a_tenant_of_nan_computes_is_found_by_nobody(tiny_engine, without):
    """Not even by itself, healed; and all completions of its prompt come to an end."""
    engine, prompt = tiny_engine, random_prompt(np.random.default_rng(5), 60)
    told = Told(engine)
    told.ask(prompt)
    sick(engine, "a")
    before = engine.loop.serving.kv.num_cached
    for _ in range(2):
        [out] = engine.generate([prompt], "a", greedy(5, n=3, temperature=1.0))
        assert {o.finish_reason for o in out.outputs} == {"error"} and out.num_cached_tokens == 0
        assert all(o.metrics.num_cached_tokens == 0 for o in out.outputs)
    assert engine.loop.serving.kv.num_cached == before
    for e in (engine, without):
        add(e, "a", 1)
    healed = Told(engine, "a")
    for one in (healed, healed, told):
        one.ask(prompt)
    healed.check(without)
    told.check(without)


def test_pages_that_gave_nan_are_read_once(tiny_engine, without):
    """Whatever spoilt them: the request that finds them ends with an error, the next one computes them anew."""
    engine, prompt = tiny_engine, random_prompt(np.random.default_rng(6), 60)
    engine.generate([prompt], None, greedy(3))
    engine.drain()
    engine.state.kv = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), engine.state.kv)
    [out] = engine.generate([prompt], None, greedy(3))
    assert out.outputs[0].finish_reason == "error" and out.num_cached_tokens == 48
    told = Told(engine)
    told.ask(prompt)
    told.check(without)


def test_prompt_logprobs_read_nothing_and_leave_something(tiny_engine, without):
    prompt = random_prompt(np.random.default_rng(7), 40)
    params = greedy(4, prompt_logprobs=1)
    outs = [e.generate([prompt], None, params)[0] for e in (tiny_engine, tiny_engine, without)]
    assert [o.num_cached_tokens for o in outs] == [0, 0, 0]
    assert outs[0].prompt_logprobs == outs[1].prompt_logprobs == outs[2].prompt_logprobs
    assert tiny_engine.generate([prompt], None, greedy(4))[0].num_cached_tokens == 32


@pytest.fixture(scope="module")
def tight(make_engine: Callable[..., Engine]) -> Iterator[Engine]:
    """Two slots and twelve KV pages, the `tight_engine` of test_serving.py."""
    yield busy_engine(make_engine, buckets=(Bucket(**SERVE),), max_num_seqs=2, num_kv_pages=13, max_adapters=2)


@pytest.mark.slow  # tests/serve/test_prefix.py evicts, too
def test_where_pages_are_few_the_oldest_go(tight, without):
    """Chats whose pages do not all fit: what is found varies, what is said does not, and everybody gets room."""
    rng, found, chats = np.random.default_rng(8), [], [[] for _ in range(4)]
    for e in (tight, without):
        add(e, "a", 1)
    for _ in range(16):
        picked = [int(i) for i in rng.integers(0, 4, 3)]
        chats = [chat if len(chat) < 90 else [] for chat in chats]
        asked = [chats[i] + random_prompt(rng, int(rng.integers(1, 30))) for i in picked]
        names = [(None, "a")[i % 2] for i in picked]
        got, want = (e.generate(asked, names, greedy(5, logprobs=0)) for e in (tight, without))
        assert numbers_of(got) == numbers_of(want)
        tight.check_integrity()
        found += [out.num_cached_tokens for out in got]
        for i, out in zip(picked, got, strict=True):
            chats[i] = out.prompt_token_ids + out.outputs[0].token_ids
    assert found.count(0) > 9 and sum(one > 0 for one in found) > 9, found
    tight.drain()
    assert tight.loop.serving.kv.num_free == 12
    reset(without)


def test_the_cache_can_be_emptied_and_switched_off(tiny_engine, make_engine):
    prompt = random_prompt(np.random.default_rng(9), 40)
    for want in (0, 32):
        assert tiny_engine.generate([prompt], None, greedy(2))[0].num_cached_tokens == want
    running = tiny_engine.submit(prompt, None, greedy(9))
    for _ in range(3):
        tiny_engine.step()
    tiny_engine.reset_prefix_cache()
    tiny_engine.check_integrity()
    assert tiny_engine.generate([prompt], None, greedy(2))[0].num_cached_tokens == 0
    assert len(running.output().outputs[0].token_ids) > 0
    with pytest.raises(ConfigError, match="enable_prefix_caching: got 1, expected true or false"):
        make_engine(enable_prefix_caching=1)


def test_salts_are_checked(tiny_engine):
    for salt in ("", 5, b"x"):
        for call in (tiny_engine.submit, tiny_engine.stream):
            with pytest.raises(RequestError, match="cache_salt"):
                call([5, 6], cache_salt=salt)
        with pytest.raises(RequestError, match="cache_salt"):
            tiny_engine.generate([[5, 6]], cache_salt=salt)
    with pytest.raises(RequestError, match=r"cache_salt: got .1 values"):
        tiny_engine.generate([[5, 6]] * 2, cache_salt=["x"])
    assert len(tiny_engine.generate([[5, 6]] * 2, None, greedy(2), cache_salt=["x", None])) == 2
