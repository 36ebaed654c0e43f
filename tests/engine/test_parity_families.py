"""Every family through `Engine.from_pretrained` against transformers: prefill whole and in chunks, decode, scoring."""

from collections.abc import Callable

import numpy as np
import pytest

from loquetier_jax import Engine
from tests.engine.engines import random_prompt
from tests.engine.parity import FULL, LIMIT, PREFILL, run, tokens_of, torch_logits, worst
from tests.models.checkpoints import FAMILIES, hf_model

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.also_gpu
LENGTHS = (20, 70, 3)  # one chunk; three chunks, longer than every window; so short that it decodes beside them


QUICK = ("llama",)
"""The other families differ from these in what tests/models/test_parity.py compares for all."""


@pytest.fixture(params=[pytest.param(f, marks=[] if f in QUICK else pytest.mark.slow) for f in FAMILIES])
def engine(request: pytest.FixtureRequest, family_engine: Callable[[str], Engine]) -> Engine:
    return family_engine(request.param)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1).numpy()


def assert_logprobs(reported: list, tokens: list[int], expected: np.ndarray) -> None:
    """Each entry of `reported` names the 16 most likely tokens and the real one, with transformers' log-probs."""
    assert len(reported) == len(tokens) == len(expected)
    for entry, token, row in zip(reported, tokens, expected, strict=True):
        assert token in entry and 16 <= len(entry) <= 17
        assert max(abs(value.logprob - row[i]) for i, value in entry.items()) <= LIMIT
        top = sorted((v.logprob for v in entry.values()), reverse=True)[:16]
        assert np.abs(np.array(top) - np.sort(row)[:-17:-1]).max() <= LIMIT


def test_serving_equals_transformers(engine: Engine) -> None:
    rng = np.random.default_rng(0)
    prompts = [random_prompt(rng, n) for n in LENGTHS]
    outputs, recorded = run(engine, prompts, [None] * len(prompts))
    model = hf_model(engine.name, dtype=torch.float32)
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens, n = tokens_of(output), len(prompt)
        logits = torch_logits(model, tokens)
        assert np.abs(logits).max() > 0.5
        errors = worst(output, recorded, logits)
        assert max(errors.values()) <= LIMIT, errors
        chunks = recorded.starts[output.request_id]
        assert len(chunks) >= -(-n // PREFILL) and (n != 20 or chunks == [0])
        expected = log_softmax(logits)
        assert_logprobs(output.outputs[0].logprobs, tokens[n:], expected[n - 1 : -1])
        assert output.prompt_logprobs[0] is None
        assert_logprobs(output.prompt_logprobs[1:], prompt[1:], expected[: n - 1])
        assert len(tokens) == n + FULL.max_tokens


def test_log_probs_equal_transformers(engine: Engine) -> None:
    rng = np.random.default_rng(1)
    sequences = [random_prompt(rng, n) for n in (50, 2, 100)]
    model = hf_model(engine.name, dtype=torch.float32)
    for ids, ours in zip(sequences, engine.log_probs(sequences), strict=True):
        expected = log_softmax(torch_logits(model, ids))[np.arange(len(ids) - 1), ids[1:]]
        assert np.abs(ours - expected).max() <= LIMIT
