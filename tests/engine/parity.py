"""An engine on a checkpoint written by transformers, and its logits at every row of every step."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from loquetier_jax import Bucket, Engine, EngineConfig, SamplingParams
from loquetier_jax.models.decoder import final_norm, logits
from loquetier_jax.serve.output import RequestOutput
from loquetier_jax.step import unified
from loquetier_jax.tiny.tokenizer import VOCAB_SIZE, save_tokenizer
from tests.models.checkpoints import tiny_checkpoint

LIMIT = 1e-4  # max abs error of logits and log-probs, f32
PREFILL, PACK = 32, 64
SERVE = Bucket(score_packs=1, score_tokens=2 * PACK, prefill=PREFILL, chunks=2, decode=8)
CONFIG = {
    "max_model_len": 128,
    "max_num_seqs": 8,
    "max_adapters": 12,
    "max_lora_rank": 32,
    "train_pages": 4,
    "logit_chunk": PACK,
    "buckets": (SERVE, Bucket(packs=1, pack_tokens=PACK)),
}
FULL = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=16, prompt_logprobs=16)


class Shown:
    """Takes the logits of all prefill and decode rows out of an engine's forwards.

    Attributes:
        logits: [rows, V] of the last one.
    """

    def __init__(self, engine: Engine) -> None:
        """Of an engine whose forwards were traced under `show_hidden`."""
        self.spec, self.state, self.forward = engine.spec, engine.state, engine.state.run_forward
        self.logits = np.empty(0)
        engine.state.run_forward = self

    def __call__(self, run: Any, flat: Any) -> Any:
        out = self.forward(run, flat)
        if out.sample_hidden is None:
            return out
        rows = len(out.sample_hidden) - SERVE.samples
        params = self.state.params
        self.logits = np.asarray(logits(self.spec, params, final_norm(self.spec, params, out.sample_hidden[:rows])))
        return out.replace(sample_hidden=out.sample_hidden[rows:])


def show_hidden(patch: pytest.MonkeyPatch) -> None:
    """Makes forwards traced from now on return the hidden states of all prefill and decode rows, then the sampled."""
    rows = unified.sample_rows
    patch.setattr(unified, "sample_rows", lambda bucket, batch, x: jnp.concatenate([x, rows(bucket, batch, x)]))


@functools.cache
def open_family(family: str, root: Path, cache: str) -> Engine:
    """`Engine.from_pretrained` on a random checkpoint of the family below `root`; forwards show their logits."""
    folder = tiny_checkpoint(family, root / family, vocab_size=VOCAB_SIZE)
    save_tokenizer(folder)
    config = EngineConfig(**CONFIG, compilation_cache_dir=cache)
    with pytest.MonkeyPatch.context() as patch:
        show_hidden(patch)
        engine = Engine.from_pretrained(folder, config=config, progress=False)
    Shown(engine)
    return engine


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

    def note(items: Any, rows: Any) -> None:
        places, at = [], 0
        for request, n in sorted(items.prefill, key=lambda chunk: chunk[0].adapter_pages):  # as in a step
            owner, start = request.request_id, request.num_prefilled
            recorded.starts.setdefault(owner, []).append(start)
            places += [("prefill", owner, start + j, at + j) for j in range(n)]
            at += -(-n // 16) * 16
        for i, r in enumerate(sorted(items.decode, key=lambda request: request.adapter_pages)):
            places.append(("decode", r.request_id, len(r.prompt_ids) + r.num_dispatched - 1, PREFILL + i))
        recorded.add(places, engine.state.run_forward.logits)
        sent(items, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.loop.serving, "sent", note)
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
