"""The model that PEFT wraps."""

import pytest

from tests.adapters.cases import SPEC


@pytest.fixture(scope="module")
def base():
    """Makes the HF model of SPEC; PEFT changes a model in place, so each test takes a new one."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=SPEC.hidden_size,
        num_hidden_layers=SPEC.num_hidden_layers,
        num_attention_heads=SPEC.num_attention_heads,
        num_key_value_heads=SPEC.num_key_value_heads,
        head_dim=SPEC.head_dim,
        intermediate_size=SPEC.intermediate_size,
        vocab_size=SPEC.vocab_size,
        max_position_embeddings=SPEC.max_position_embeddings,
    )
    return lambda: LlamaForCausalLM(config)
