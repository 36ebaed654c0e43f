"""The base's fingerprint sees any changed bit, place, shape or name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from loquetier_jax.models.linear import Dense
from loquetier_jax.models.load import init_random
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.train.fingerprint import base_fingerprint

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


def test_a_fingerprint_outlives_the_classes_of_weights():
    """A base has that of its arrays in plain dicts, biases beside their matrices: checkpoints of old name that one."""
    changes = {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 2, "sliding_window": (None,) * 2}
    spec = dataclasses.replace(SPEC, **changes)
    params = init_random(spec, jax.random.key(0))
    layers = []
    for layer in params["layers"]:
        plain = {name: w for name, w in layer.items() if not isinstance(w, Dense)}
        for group in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
            plain[group] = layer[group].w
            if layer[group].bias is not None:
                plain[group.removesuffix("proj") + "bias"] = layer[group].bias
        layers.append(plain)
    assert sum(name.endswith("bias") for name in layers[0]) == 3
    plain = params | {"layers": layers, "lm_head": params["lm_head"].w}
    assert base_fingerprint(spec, params) == base_fingerprint(spec, plain)
