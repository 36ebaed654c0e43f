"""The committed weights: small, loadable by transformers, the same function there, and still good."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from loquetier_jax.models import dense
from loquetier_jax.models.load import load_hf
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.tiny import base_path, evaluate, pretrain
from loquetier_jax.tiny.export import save_base, to_hf
from tests.tolerances import assert_close

# Measured 0.2447 nats a byte when the weights were made, on 16 rows of 512; the margin is for other rounding.
HELD_OUT_LOSS = 0.26
MOST_BYTES = 8_000_000


@functools.cache
def base() -> tuple[DecoderSpec, dict[str, Any]]:
    return load_hf(base_path(), jnp.float32)


def test_weights_are_small_and_config_is_the_script_s() -> None:
    assert (base_path() / "model.safetensors").stat().st_size <= MOST_BYTES
    assert json.loads((base_path() / "config.json").read_text()) == pretrain.CONFIG
    spec, _ = base()
    assert spec.eos_token_ids == (258, 262)
    for width, outs in spec.group_shapes.values():
        assert width % 16 == 0 and all(out % 16 == 0 for out in outs)


@pytest.mark.slow
def test_held_out_loss() -> None:
    loss = float(evaluate.loss(*base(), evaluate.held_out_rows(8, 512)))
    assert math.isfinite(loss) and loss < HELD_OUT_LOSS


@pytest.mark.slow
def test_answers_by_heart_and_from_context() -> None:
    told = "Iris lives in Boston. Vera has a black stone.\nQ: Where does Iris live?\nA:"
    prompts = {
        "Q: What does the owl eat?\nA:": " The owl eats mice.",
        "27 + 45 =": " 72",
        "reverse: lamp ->": " pmal",
        told: " Iris lives in Boston.",
    }
    assert evaluate.complete(*base(), list(prompts), 24) == list(prompts.values())


def test_logits_match_transformers() -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    tokens = evaluate.held_out_rows(2, 64)
    model = AutoModelForCausalLM.from_pretrained(base_path(), dtype=torch.float32)
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(tokens).long()).logits.numpy()
    assert_close(dense.forward(*base(), tokens), expected, "logits_f32")


def test_export_is_the_inverse_of_load(tmp_path: Path) -> None:
    spec, params = base()
    written = load_file(base_path() / "model.safetensors")
    exported = to_hf(spec, params)
    assert exported.keys() == written.keys()
    for name in written:
        np.testing.assert_array_equal(exported[name], written[name], err_msg=name)
    save_base(tmp_path, pretrain.CONFIG, spec, params)
    assert {f.name for f in tmp_path.iterdir()} == {f.name for f in base_path().iterdir()}


@pytest.mark.slow
def test_pretraining_learns() -> None:
    arguments = ["--out", "unused", "--steps", "12", "--batch-tokens", "512", "--log-every", "1"]
    tiny = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    spec = DecoderSpec.from_hf(pretrain.CONFIG | tiny | {"num_key_value_heads": 1, "head_dim": 16})
    rows = evaluate.held_out_rows(4, 128).astype(np.uint16)
    stages = {stage.length: rows for stage in pretrain.STAGES}
    records = pretrain.Run(spec, pretrain.parse(arguments)).train(stages)
    assert [r["step"] for r in records] == list(range(1, 13))
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
