"""The base's fingerprint sees any changed bit, place, shape or name."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from loquetier_jax.jobs.fingerprint import base_fingerprint
from loquetier_jax.models.spec import DecoderSpec

SPEC = DecoderSpec.from_hf(
    {
        "model_type": "llama",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "vocab_size": 32,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    }
)


def test_fingerprint():
    w = np.random.default_rng(0).standard_normal((4, 6), np.float32)
    one_bit = (w.view(np.uint32) ^ (np.arange(24).reshape(4, 6) == 13)).astype(np.uint32).view(np.float32)
    variants = [
        {"a": w},
        {"b": w},
        {"a": w.T.copy()},
        {"a": w.reshape(6, 4)},
        {"a": w[::-1].copy()},
        {"a": one_bit},
        {"a": jnp.asarray(w, jnp.bfloat16)},
        {"a": jnp.asarray(w, jnp.float16)},
    ]
    prints = [base_fingerprint(SPEC, params) for params in variants]
    prints.append(base_fingerprint(dataclasses.replace(SPEC, rms_norm_eps=1e-6), variants[0]))
    assert len(set(prints)) == len(prints)
    assert base_fingerprint(SPEC, {"a": jnp.asarray(w)}) == prints[0]
