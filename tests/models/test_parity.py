"""Every family, loaded from a sharded checkpoint, against transformers."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loquetier_jax.models import decoder, dense
from loquetier_jax.models.load import load_hf
from loquetier_jax.models.spec import DecoderSpec
from tests.models.checkpoints import FAMILIES, hf_logits, hf_model, tiny_checkpoint

torch = pytest.importorskip("torch")

forward = jax.jit(dense.forward, static_argnums=0)
LENGTH = 40  # longer than the window, and far enough for every rope frequency to turn

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_explicit_head_dim": ("llama", {"head_dim": 12, "num_key_value_heads": 4}),
    "llama_gelu": ("llama", {"hidden_act": "gelu"}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2_upper_layers_slide": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3_untied_biased": ("qwen3", {"tie_word_embeddings": False, "attention_bias": True}),
    "mistral_full": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "gemma_legacy_gelu": ("gemma", {"hidden_act": "gelu", "num_key_value_heads": 2}),
}


def random_tokens(batch: int = 2, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 96, (batch, length), dtype=np.int32)


SLOW = {"llama_explicit_head_dim", "qwen2_tied", "qwen3_untied_biased", "mistral_full", "gemma_legacy_gelu"}


@pytest.mark.also_gpu
@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES])
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    family, overrides = CASES[case]
    folder = tiny_checkpoint(family, tmp_path, **overrides)
    assert len(list(folder.glob("*.safetensors"))) > 2, "the checkpoint is meant to be sharded"
    spec, params = load_hf(folder, "float32")
    tokens = random_tokens()
    ours = forward(spec, params, tokens)
    # The first Gemma files say "gelu" and mean its tanh form; older releases of transformers take them at their word.
    meant = {"hidden_act": "gelu_pytorch_tanh"} if case == "gemma_legacy_gelu" else {}
    expected = hf_logits(folder, tokens, **meant)
    assert ours.dtype == jnp.float32
    assert np.abs(expected).max() > 0.5
    assert np.abs(np.asarray(ours) - expected).max() <= 1e-4


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma"])
def test_hub_form_of_the_config_gives_the_same_model(family: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(family, tmp_path)
    new = load_hf(folder, "float32")[0]
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))
    assert load_hf(folder, "float32")[0] == new


def test_scaling_acts_and_matches_at_long_positions() -> None:
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = transformers.LlamaConfig(rope_parameters=rope, max_position_embeddings=131072)
    positions = np.array([0, 1, 1000, 8192, 131071], np.int32)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor(positions)[None])
    ours = decoder.rope_tables(DecoderSpec.from_hf(config), jnp.asarray(positions))
    # An f32 angle of 131071 radians is known to 2^17 * 2^-24 = 8e-3.
    for mine, theirs in zip(ours, (cos, sin), strict=True):
        np.testing.assert_allclose(mine[:4], theirs[0, :4, :64].numpy(), atol=1e-3)
        np.testing.assert_allclose(mine, theirs[0, :, :64].numpy(), atol=2e-2)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_bfloat16_embedding_and_norm_round_as_transformers_does(family: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(family, tmp_path, dtype=torch.bfloat16)
    spec, params = load_hf(folder)
    assert params["norm"].dtype == jnp.bfloat16, "without a dtype, the config's is taken"
    model = hf_model(folder, dtype=torch.bfloat16)
    tokens = random_tokens(1)[0]
    with torch.no_grad():
        embedded = model.model.embed_tokens(torch.tensor(tokens))
        normed = model.model.norm(embedded)
    ours = decoder.embed(spec, params, jnp.asarray(tokens))
    np.testing.assert_array_equal(np.asarray(ours, np.float32), embedded.float().numpy())
    ours = np.asarray(decoder.final_norm(spec, params, ours), np.float32)
    # rsqrt may differ in its last bit, which moves a value to the neighbouring bf16 now and then.
    assert np.mean(ours != normed.float().numpy()) < 0.01


def test_bfloat16_logits_are_close_to_float32(tmp_path: Path) -> None:
    folder = tiny_checkpoint("qwen3", tmp_path)
    tokens = random_tokens()
    spec, params = load_hf(folder, "bfloat16")
    logits = forward(spec, params, tokens)
    assert logits.dtype == jnp.float32
    # 2^-9 a rounding, some 20 roundings deep, logits up to about 4.
    np.testing.assert_allclose(logits, hf_logits(folder, tokens), atol=0.15)
