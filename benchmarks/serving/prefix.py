"""What the prefix cache saves multi-turn chats that share a long beginning: TTFT with it and without it.

    python -m benchmarks.serving.prefix            # on a GPU: the `gpu` preset, made long enough, at 8B shapes
    python -m benchmarks.serving.prefix --tiny     # the same code on a CPU, to see that it runs

Eight chats begin with the same 4,096 tokens and go on by themselves: a chat sends its next message, with all that was
said before, as soon as it has its answer. Without the cache every request has a salt of its own, so that nothing is
found; all else is the same, the engine too. Cases: prefix/<chats>x<turns>x<shared tokens>/{with,without}.
"""

import argparse
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.results import record, write
from benchmarks.serving.world import World
from benchmarks.unified.smoke import llama_8b, load_adapters, tiny
from loquetier_jax import Engine, SamplingParams
from loquetier_jax.models.load import init_random
from loquetier_jax.presets import engine_config, overridden
from loquetier_jax.serve.handle import RequestHandle
from loquetier_jax.serve.output import RequestOutput

MAX_PROMPT_ID = 127_000  # no special tokens
BOUND = 4.0  # of the ratio of median TTFTs


@dataclass(frozen=True)
class Talk:
    """The shape of the chats: how many, how often each user speaks, and tokens: shared, of a message, of an answer."""

    chats: int = 8
    turns: int = 6
    shared: int = 4096
    message: int = 64
    answer: int = 64

    @property
    def name(self) -> str:
        return f"{self.chats}x{self.turns}x{self.shared}"

    @property
    def longest(self) -> int:
        """Tokens of a chat at its end."""
        return self.shared + self.turns * (self.message + self.answer)


TINY = Talk(chats=4, turns=4, shared=320, message=16, answer=8)


@dataclass
class Chat:
    """One chat: what was said so far, the messages to come, the request under way, and all outputs."""

    said: list[int]
    messages: list[list[int]]
    adapter: str | None
    handle: RequestHandle | None = None
    outputs: list[RequestOutput] = field(default_factory=list)

    def go_on(self, engine: Engine, answer: int, salt: str | None) -> bool:
        """Takes the answer if there is one, and sends the next message if there is one; False at the end."""
        if self.handle is not None:
            if not self.handle.finished:
                return True
            self.outputs.append(self.handle.output())
            self.said = [*self.outputs[-1].prompt_token_ids, *self.outputs[-1].outputs[0].token_ids]
            self.handle = None
        if not self.messages:
            return False
        params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
        own = None if salt is None else f"{salt}-{len(self.messages)}"
        self.handle = engine.submit(self.said + self.messages.pop(0), self.adapter, params, cache_salt=own)
        return True


def converse(engine: Engine, talk: Talk, adapter: str | None, cached: bool) -> list[RequestOutput]:
    """All outputs of the chats, chat by chat; from an empty cache."""
    rng, limit = np.random.default_rng(0), min(MAX_PROMPT_ID, engine.spec.vocab_size)
    shared = rng.integers(10, limit, talk.shared).tolist()
    messages = rng.integers(10, limit, (talk.chats, talk.turns, talk.message)).tolist()
    chats = [Chat(shared, list(one), adapter) for one in messages]
    engine.reset_prefix_cache()
    salts = [None if cached else str(i) for i in range(talk.chats)]
    while True:
        going = [chat.go_on(engine, talk.answer, salt) for chat, salt in zip(chats, salts, strict=True)]
        if not any(going):
            break
        engine.step()
    return [output for chat in chats for output in chat.outputs]


def run(world: World) -> list[dict[str, Any]]:
    """prefix/*: as many shared tokens as the preset's longest request has room for, at most 4,096; on one adapter."""
    talk = TINY if world.small else Talk()
    room = world.engine.cfg.max_model_len - (talk.longest - talk.shared)
    return measure(world.engine, replace(talk, shared=min(talk.shared, room)), world.adapters[0])


def measure(engine: Engine, talk: Talk, adapter: str | None) -> list[dict[str, Any]]:
    """The records of one engine."""
    converse(engine, Talk(2, 1, talk.shared, talk.message, talk.answer), adapter, cached=True)  # warm
    records, medians, answers = [], {}, {}
    for name, cached in (("without", False), ("with", True)):
        outputs = converse(engine, talk, adapter, cached)
        ttft = 1e3 * np.array([o.metrics.ttft for o in outputs])
        prompts = sum(len(o.prompt_token_ids) for o in outputs)
        share = 100 * sum(o.num_cached_tokens for o in outputs) / prompts
        case, medians[name] = f"prefix/{talk.name}/{name}", float(np.median(ttft))
        answers[name] = [o.outputs[0].token_ids for o in outputs]
        records += [
            record(case, "median_ttft_ms", medians[name], "ms"),
            record(case, "p99_ttft_ms", float(np.percentile(ttft, 99)), "ms"),
            record(case, "cached_tokens", share, "%"),
        ]
    same = sum(a == b for a, b in zip(*answers.values(), strict=True))
    note = f"{same} of {len(answers['with'])} answers are the same, token by token"
    ratio = medians["without"] / medians["with"]
    return [*records, record(f"prefix/{talk.name}", "median_ttft_ratio", ratio, "x", bound=BOUND, note=note)]


def make_engine(small: bool, talk: Talk) -> tuple[Engine, str]:
    """The preset of the card, long enough for the chats, with one adapter of rank 16."""
    spec, cfg = (tiny(), engine_config("cpu")) if small else (llama_8b(), engine_config("gpu"))
    cfg = overridden(cfg, {"max_model_len": max(cfg.max_model_len, -(-talk.longest // 1024) * 1024)})
    params = jax.block_until_ready(init_random(spec, jax.random.key(0), jnp.dtype(cfg.dtype)))
    engine = Engine(spec, params, cfg)
    return engine, load_adapters(engine, 1)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small model and short chats, for a CPU")
    parser.add_argument("--out", type=Path, help="folder for the result, instead of benchmarks/results")
    args = parser.parse_args()
    talk = TINY if args.tiny else Talk()
    engine, adapter = make_engine(args.tiny, talk)
    with engine:
        records = measure(engine, talk, adapter)
        engine.check_integrity()
    for r in records:
        print(f"{r['case']:28} {r['metric']:18} {r['value']:10.2f} {r['unit']} {r.get('note', '')}")
    shapes = "tiny" if args.tiny else "Llama-3.1-8B"
    print(write("prefix", {"shapes": shapes, "preset": "cpu" if args.tiny else "gpu"}, records, folder=args.out))


if __name__ == "__main__":
    main()
