"""An engine on a checkpoint written by transformers, and its logits at every row of every step."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loquetier_jax import Bucket, Engine, EngineConfig, SamplingParams
from loquetier_jax.serve.output import RequestOutput
from loquetier_jax.step import unified
from loquetier_jax.tiny.tokenizer import VOCAB_SIZE, save_tokenizer
from tests.models.checkpoints import tiny_checkpoint

LIMIT = 1e-4  # max abs error of logits and log-probs, f32
PREFILL, PACK = 32, 64
CONFIG = {
    "max_model_len": 128,
    "max_num_seqs": 8,
    "max_adapters": 12,
    "max_lora_rank": 32,
    "train_pages": 4,
    "logit_chunk": PACK,
    "buckets": (
        Bucket(score_packs=1, score_tokens=2 * PACK, prefill=PREFILL, chunks=2, decode=8),
        Bucket(packs=1, pack_tokens=PACK),
    ),
}
FULL = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=16, prompt_logprobs=16)


def show_logits(patch: pytest.MonkeyPatch) -> None:
    """Makes forwards traced from now on return the logits of all prefill and decode rows among what is sampled."""
    rows, head, sample = unified.sample_rows, unified.sample_logits, unified.sample
    taken: dict[str, Any] = {}

    def sample_rows(bucket: Bucket, batch: Any, x: Any) -> Any:
        taken["x"] = x
        return rows(bucket, batch, x)

    def sample_logits(spec: Any, params: Any, x: Any) -> Any:
        taken["logits"] = head(spec, params, taken.pop("x"))
        return head(spec, params, x)

    def sample_and_show(*args: Any, **kwargs: Any) -> Any:
        slots, out = sample(*args, **kwargs)
        return slots, out | {"logits": taken.pop("logits")}

    patch.setattr(unified, "sample_rows", sample_rows)
    patch.setattr(unified, "sample_logits", sample_logits)
    patch.setattr(unified, "sample", sample_and_show)


@functools.cache
def open_family(family: str, root: Path, cache: str) -> Engine:
    """`Engine.from_pretrained` on a random checkpoint of the family below `root`; forwards show their logits."""
    folder = tiny_checkpoint(family, root / family, vocab_size=VOCAB_SIZE)
    save_tokenizer(folder)
    config = EngineConfig(**CONFIG, compilation_cache_dir=cache)
    with pytest.MonkeyPatch.context() as patch:
        show_logits(patch)
        return Engine.from_pretrained(folder, config=config, progress=False)


class Recording:
    """What the steps of a while have computed.

    Attributes:
        logits: {request_id: {position: (kind, [V] logits)}}, kind is "prefill" or "decode".
        together: Per step, who had rows in it: {(kind, request_id)}.
        starts: {request_id: first position of each of its chunks}.
    """

    def __init__(self) -> None:
        self.logits: dict[str, dict[int, tuple[str, np.ndarray]]] = {}
        self.together: list[set[tuple[str, str]]] = []
        self.starts: dict[str, list[int]] = {}

    def add(self, places: list[tuple[str, str, int, int]], logits: np.ndarray) -> None:
        """Takes one step: (kind, request_id, position, row) of its rows and the logits of all rows."""
        self.together.append({place[:2] for place in places})
        for kind, request_id, position, row in places:
            assert position not in self.logits.setdefault(request_id, {}), "a position is computed once"
            self.logits[request_id][position] = kind, logits[row]

    def of(self, output: RequestOutput, kind: str) -> dict[int, np.ndarray]:
        """{position: [V]} of one request's rows of a kind."""
        found = self.logits[output.request_id].items()
        return {position: logits for position, (k, logits) in found if k == kind}


@contextmanager
def recording(engine: Engine) -> Iterator[Recording]:
    """Records every forward of an engine whose forwards show their logits."""
    recorded, sent = Recording(), engine.loop.serving.sent
    pending_places: dict[int, Any] = {}

    def note(items: Any, bucket: Bucket) -> Any:
        owners = {r.slot: r.request_id for r in engine.loop.serving.running.values()}
        places, at = [], 0
        for chunk in items.prefill:
            owner, n = owners[chunk.served.slot], len(chunk.tokens)
            recorded.starts.setdefault(owner, []).append(chunk.start)
            places += [("prefill", owner, chunk.start + j, at + j) for j in range(n)]
            at += -(-n // 16) * 16
        decode = enumerate(items.decode)
        places += [("decode", owners[d.served.slot], d.position, bucket.prefill + i) for i, d in decode]
        rows = sent(items, bucket)
        pending_places[id(rows)] = places
        return rows

    def read(pending: Any, ms: float) -> None:
        if "logits" in pending.sampled:
            recorded.add(pending_places.pop(id(pending.rows)), np.asarray(pending.sampled["logits"]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.loop.serving, "sent", note)
        patch.setattr(engine.loop, "on_iteration", read)
        yield recorded
        engine.drain()


def run(
    engine: Engine, prompts: Sequence[list[int]], adapters: Sequence[str | None], params: SamplingParams = FULL
) -> tuple[list[RequestOutput], Recording]:
    """Generates for all prompts at once and records the logits."""
    with recording(engine) as recorded:
        outputs = engine.generate(list(prompts), list(adapters), params)
    engine.check_integrity()
    return outputs, recorded


def tokens_of(output: RequestOutput) -> list[int]:
    """Prompt and output."""
    return [*output.prompt_token_ids, *output.outputs[0].token_ids]


def torch_logits(model: Any, tokens: Sequence[int]) -> np.ndarray:
    """[n, V] logits of a torch model for one sequence."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([list(tokens)])).logits[0].float().numpy()


def worst(output: RequestOutput, recorded: Recording, expected: np.ndarray) -> dict[str, float]:
    """Largest abs error of a request's logits, by kind of row; every position must have been computed.

    Args:
        output: The finished request.
        recorded: While it ran.
        expected: [n, V] logits of its n tokens.
    """
    prompt, n = len(output.prompt_token_ids), len(tokens_of(output))
    errors = {}
    for kind, positions in (("prefill", range(prompt)), ("decode", range(prompt, n - 1))):
        found = recorded.of(output, kind)
        assert sorted(set(found) - {n - 1}) == list(positions)  # n - 1: the surplus row of running a step ahead
        errors[kind] = max(float(np.abs(found[p] - expected[p]).max()) for p in positions)
    return errors
