"""Configs, the rules that match their names to modules, initial weights (PEFT itself: test_peft.py)."""

import dataclasses
import math

import numpy as np
import pytest

from loquetier_jax.adapters.lora import (
    LoraConfig,
    LoraModule,
    LoraShape,
    check_weights,
    init_weights,
    resolve_shape,
)
from loquetier_jax.config_file import from_dict
from loquetier_jax.errors import AdapterError, ConfigError
from tests.adapters.cases import MIXED, SPEC, random_weights, uniform


def targets_of(config: LoraConfig) -> set[tuple[int, str]]:
    return {(m.layer, m.target) for m in resolve_shape(config, SPEC).modules}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {(0, "q_proj"), (0, "v_proj"), (1, "q_proj"), (1, "v_proj")}),
        ({"target_modules": ["o_proj"]}, {(0, "o_proj"), (1, "o_proj")}),
        ({"target_modules": ["self_attn.k_proj"]}, {(0, "k_proj"), (1, "k_proj")}),
        ({"target_modules": ["model.layers.1.mlp.up_proj"]}, {(1, "up_proj")}),
        ({"target_modules": r".*\.0\.mlp\.(up|down)_proj"}, {(0, "up_proj"), (0, "down_proj")}),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, {(1, "q_proj")}),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.v_proj"]},
         {(0, "q_proj"), (1, "q_proj"), (1, "v_proj")}),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"}, {(0, "q_proj")}),
    ],
)
def test_names_match_as_in_peft(fields: dict, expected: set) -> None:
    assert targets_of(LoraConfig(**fields)) == expected


def test_all_linear_is_every_projection() -> None:
    found = targets_of(LoraConfig(target_modules="all-linear"))
    assert found == targets_of(LoraConfig(target_modules=r".*_proj")) and len(found) == 14


def test_patterns_set_rank_and_scaling_of_single_modules() -> None:
    # The example of PEFT's documentation, run there: 32/2, 32/4 and 16/4.
    config = LoraConfig(
        r=4, lora_alpha=16, rank_pattern={"layers.0.self_attn.q_proj": 2}, alpha_pattern={"q_proj": 32}
    )
    found = {key: (m.r, m.scaling) for key, m in resolve_shape(config, SPEC).by_key.items()}
    assert found == {
        "layers.0.q_proj": (2, 16.0),
        "layers.0.v_proj": (4, 4.0),
        "layers.1.q_proj": (4, 8.0),
        "layers.1.v_proj": (4, 4.0),
    }
    rank_stable = resolve_shape(dataclasses.replace(config, use_rslora=True), SPEC)
    assert rank_stable.by_key["layers.0.q_proj"].scaling == 32 / math.sqrt(2)


def test_shapes_are_values() -> None:
    shape = LoraShape(tuple(reversed(MIXED.modules)))
    assert shape == MIXED and hash(shape) == hash(MIXED)
    assert (MIXED.max_rank, MIXED.num_pages) == (40, 3)
    assert [uniform(r).num_pages for r in (1, 16, 17, 32, 33)] == [1, 1, 2, 2, 3]
    assert MIXED.array_shapes(SPEC)["layers.0.down_proj"] == {"lora_A": (17, 40), "lora_B": (24, 17)}
    with pytest.raises(AdapterError, match="modules"):
        LoraShape(())
    with pytest.raises(AdapterError, match="q_proj"):
        LoraShape((LoraModule(0, "q_proj", 4, 1.0), LoraModule(0, "q_proj", 8, 1.0)))
    with pytest.raises(AdapterError, match="qproj"):
        LoraShape((LoraModule(0, "qproj", 4, 1.0),))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"target_modules": ["q_prj"]}, "q_prj"),
        ({"target_modules": ["q_proj", "qkv"]}, "qkv"),
        ({"target_modules": r".*\.experts\..*"}, "experts"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ".*"}, "lm_head"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
        ({"exclude_modules": ["w1"]}, "w1"),
        ({"rank_pattern": {"k_projj": 4}}, "k_projj"),
        ({"alpha_pattern": {"layers.7.*": 4}}, "layers.7"),
        ({"layers_to_transform": [0, 2]}, "layers_to_transform"),
        ({"exclude_modules": ["q_proj", "v_proj"]}, "matches no module"),
    ],
)
def test_what_matches_nothing_is_refused_by_name(fields: dict, name: str) -> None:
    with pytest.raises(AdapterError, match=name):
        resolve_shape(LoraConfig(**fields), SPEC)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", 0), ("r", 2.0), ("r", True), ("lora_alpha", 0), ("lora_alpha", float("nan")),
        ("lora_dropout", 1.0), ("lora_dropout", -0.1), ("use_rslora", 1), ("rank_pattern", {"q": 0}),
        ("rank_pattern", ["q"]), ("alpha_pattern", {"(": 1}), ("target_modules", ["q", 1]),
        ("target_modules", "("), ("target_modules", ""), ("exclude_modules", 3), ("init_lora_weights", False),
        ("init_lora_weights", "pissa"), ("layers_to_transform", [-1]), ("layers_to_transform", ["0"]),
    ],
)
def test_bad_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        LoraConfig(**{name: value})


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ConfigError, match="use_dora"):
        from_dict(LoraConfig, {"r": 4, "use_dora": True})
    config = from_dict(LoraConfig, {"target_modules": ["v_proj", "q_proj"]})
    assert config.target_modules == ("q_proj", "v_proj")


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_initial_weights_follow_seed_layer_and_target_alone(init: bool | str) -> None:
    config = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=init)
    shape = resolve_shape(config, SPEC)
    weights = init_weights(shape, config, SPEC, seed=3)
    check_weights(weights, shape, SPEC)
    single = dataclasses.replace(config, target_modules=["layers.1.self_attn.k_proj"])
    again = init_weights(resolve_shape(single, SPEC), single, SPEC, seed=3)
    np.testing.assert_array_equal(again["layers.1.k_proj"]["lora_A"], weights["layers.1.k_proj"]["lora_A"])
    everything = [w["lora_A"] for w in weights.values()] + [
        w["lora_A"] for w in init_weights(shape, config, SPEC, seed=4).values()
    ]
    assert len({a.tobytes() for a in everything}) == len(everything)
    assert not any(np.any(w["lora_B"]) for w in weights.values())
    a = np.stack([w["lora_A"].ravel() for k, w in weights.items() if "down" not in k and "o_proj" not in k])
    if init is True:
        bound = 1 / math.sqrt(SPEC.hidden_size)
        assert np.abs(a).max() <= bound and a.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    else:
        assert a.std() == pytest.approx(1 / 8, rel=0.05)  # PEFT's standard deviation is 1/r
    with pytest.raises(ConfigError, match="seed"):
        init_weights(shape, config, SPEC, seed=-1)


def test_weights_of_another_shape_are_refused() -> None:
    weights = random_weights(MIXED)
    check_weights(weights, MIXED, SPEC)
    with pytest.raises(AdapterError, match=r"layers\.0\.down_proj"):
        check_weights({k: v for k, v in weights.items() if k != "layers.0.down_proj"}, MIXED, SPEC)
    with pytest.raises(AdapterError, match=r"layers\.1\.q_proj.*not in"):
        check_weights({**weights, "layers.1.q_proj": weights["layers.0.q_proj"]}, MIXED, SPEC)
    transposed = {**weights, "layers.0.q_proj": {k: v.T for k, v in weights["layers.0.q_proj"].items()}}
    with pytest.raises(AdapterError, match=r"\(24, 40\).*\(40, 24\)"):
        check_weights(transposed, MIXED, SPEC)
    with pytest.raises(AdapterError, match="lora_magnitude"):
        check_weights({**weights, "layers.0.q_proj": {"lora_magnitude": np.zeros(3)}}, MIXED, SPEC)
