"""The reference forward: adapters, gradients, windows."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loquetier_jax.models import dense
from loquetier_jax.models.load import init_random, load_hf
from loquetier_jax.models.spec import GROUPS, MODULES, DecoderSpec

SPEC = DecoderSpec(
    model_type="llama", hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=4, intermediate_size=24, vocab_size=32, max_position_embeddings=64, sliding_window=(None, 3),
)  # fmt: skip

forward = jax.jit(dense.forward, static_argnums=0)


def draw_lora(spec: DecoderSpec, keys: list[tuple[int, str]], r: int = 3) -> dense.Lora:
    rng = np.random.default_rng(1)
    shapes = {key: spec.target_shapes[key[1]] for key in keys}
    return {
        key: (
            jnp.asarray(rng.normal(size=(r, inputs)), jnp.float32),
            jnp.asarray(rng.normal(size=(outputs, r)), jnp.float32),
            0.5,
        )
        for key, (inputs, outputs) in shapes.items()
    }


@pytest.mark.parametrize("window", [None, 1, 3])
def test_attention_equals_a_loop(window: int | None) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 7, heads, 4)).astype(np.float32) for heads in (4, 2, 2))
    expected = np.zeros_like(q)
    for p in range(7):
        first = 0 if window is None else max(0, p - window + 1)
        for n in range(4):
            scores = k[0, first : p + 1, n // 2] @ q[0, p, n] / 2.0
            weights = np.exp(scores - scores.max())
            expected[0, p, n] = weights / weights.sum() @ v[0, first : p + 1, n // 2]
    actual = dense.causal_attention(*map(jnp.asarray, (q, k, v)), window=window)
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_an_adapter_equals_merged_weights() -> None:
    params = init_random(SPEC, jax.random.key(0))
    lora = draw_lora(SPEC, [(0, "q_proj"), (0, "v_proj"), (1, "o_proj"), (1, "up_proj"), (0, "down_proj")])
    merged = jax.tree.map(np.array, params)
    for (index, target), (a, b, scaling) in lora.items():
        group = next(g for g, targets in GROUPS.items() if target in targets)
        ends = np.cumsum(SPEC.group_shapes[group][1])
        end = ends[GROUPS[group].index(target)]
        start = end - SPEC.target_shapes[target][1]
        weights = merged["layers"][index]
        weights[group].w[:, start:end] += scaling * (np.asarray(b) @ np.asarray(a)).T
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    expected = forward(SPEC, merged, tokens)
    np.testing.assert_allclose(forward(SPEC, params, tokens, lora), expected, atol=2e-5)
    assert np.abs(np.asarray(forward(SPEC, params, tokens) - expected)).max() > 0.1


def test_a_later_token_changes_nothing_before_it() -> None:
    params = init_random(SPEC, jax.random.key(0))
    tokens = np.arange(8, dtype=np.int32)[None]
    changed = tokens.copy()
    changed[0, -1] = 31
    before, after = (forward(SPEC, params, t) for t in (tokens, changed))
    np.testing.assert_array_equal(before[:, :-1], after[:, :-1])


def test_gradients_reach_the_adapter_and_the_base() -> None:
    params = init_random(SPEC, jax.random.key(0))
    lora = draw_lora(SPEC, [(0, target) for target in MODULES])
    tokens = np.arange(6, dtype=np.int32)[None]
    grads = jax.jit(jax.grad(lambda p, a: dense.forward(SPEC, p, tokens, a).var(), argnums=(0, 1)))(
        params, lora
    )
    assert all(np.abs(np.asarray(g)).max() > 0 for g in jax.tree.leaves(grads[1]))
    assert all(np.abs(np.asarray(g)).max() > 0 for g in jax.tree.leaves(grads[0]["layers"]))


# peft 0.21 asks transformers for a name that it has deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_equals_peft(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from tests.models.checkpoints import hf_model, tiny_checkpoint

    folder = tiny_checkpoint("qwen2", tmp_path)
    spec, params = load_hf(folder, "float32")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(MODULES), init_lora_weights=False)
    model = peft.get_peft_model(hf_model(folder), config)
    state = {name: value.numpy() for name, value in model.state_dict().items() if "lora_" in name}
    lora = {}
    for index in range(spec.num_hidden_layers):
        for target, path in MODULES.items():
            name = f"base_model.model.model.layers.{index}.{path}.lora_"
            a, b = (state[f"{name}{side}.default.weight"] for side in "AB")
            lora[index, target] = (jnp.asarray(a), jnp.asarray(b), 6 / 4)
    tokens = np.arange(20, dtype=np.int32)[None]
    with torch.no_grad():
        expected = model(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
    np.testing.assert_allclose(forward(spec, params, tokens, lora), expected, atol=1e-4, rtol=1e-4)
