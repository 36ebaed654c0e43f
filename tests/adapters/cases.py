"""The base and the adapters that the tests of this folder share."""

import numpy as np

from loquetier_jax.adapters.lora import LoraModule, LoraShape
from loquetier_jax.adapters.targets import TARGETS
from loquetier_jax.models.spec import DecoderSpec

SPEC = DecoderSpec(
    model_type="llama",
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=40,
    vocab_size=64,
    max_position_embeddings=64,
    sliding_window=(None, None),
)
RANKS = (1, 8, 16, 17, 40)


def uniform(r: int) -> LoraShape:
    return LoraShape(tuple(LoraModule(layer, t, r, 2 / r) for layer in range(2) for t in TARGETS))


MIXED = LoraShape(
    (
        LoraModule(0, "q_proj", 40, 0.3),
        LoraModule(0, "v_proj", 1, 2.0),
        LoraModule(0, "down_proj", 17, 1.5),
        LoraModule(1, "k_proj", 16, 0.25),
        LoraModule(1, "up_proj", 8, 3.0),
    )
)
def random_weights(shape: LoraShape, seed: int = 0) -> dict:
    stream = np.random.default_rng(seed)
    return {
        key: {name: stream.standard_normal(size).astype(np.float32) for name, size in arrays.items()}
        for key, arrays in shape.array_shapes(SPEC).items()
    }


def peft_deltas(model) -> dict[str, np.ndarray]:
    """{"layers.{i}.{target}": scaling * B @ A} as PEFT computes it."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            parts = name.split(".")
            layer = parts[parts.index("layers") + 1]
            found[f"layers.{layer}.{parts[-1]}"] = module.get_delta_weight("default").detach().numpy()
    return found


def our_deltas(weights: dict, shape) -> dict[str, np.ndarray]:
    scaling = {key: module.scaling for key, module in shape.by_key.items()}
    return {k: (w["lora_B"].astype(np.float64) @ w["lora_A"]) * scaling[k] for k, w in weights.items()}


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(actual[key], value, rtol=1e-5, atol=1e-5, err_msg=key)
