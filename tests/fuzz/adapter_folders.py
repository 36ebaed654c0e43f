"""Folders of PEFT adapters: a config and its tensors."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from loquetier_jax.adapters.lora import LoraConfig, check_weights, resolve_shape
from loquetier_jax.adapters.peft import CONFIG_FILE, WEIGHTS_FILE, read_peft, write_peft
from loquetier_jax.errors import AdapterError
from tests.adapters.cases import SPEC, random_weights
from tests.fuzz.kind import listing
from tests.fuzz.mutate import json_text, mutate_bytes, mutate_file, mutate_safetensors, mutate_tree, put

# Keys that PEFT writes, beside those that `write_peft` does.
MORE = {"exclude_modules": None, "layers_to_transform": None, "modules_to_save": None, "loftq_config": {}}
REGEX = {"target_modules": r".*\.(q|v)_proj", "rank_pattern": {r"layers\.0\..*q_proj": 3}}
CONFIGS = (
    LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_rslora=True),
    LoraConfig(r=4, **REGEX, alpha_pattern={"v_proj": 2.5}),
)


class AdapterFolders:
    """A good adapter of which the config, the tensors or the folder are damaged."""

    errors = (AdapterError,)

    def __init__(self, folder: Path) -> None:
        self._root, self._folder = folder, folder / "adapter"
        self._good = [self._written(config) for config in CONFIGS]

    def _written(self, config: LoraConfig) -> tuple[dict[str, Any], bytes]:
        shape = resolve_shape(config, SPEC)
        write_peft(self._folder, random_weights(shape), shape, SPEC, config=config)
        told = json.loads((self._folder / CONFIG_FILE).read_text()) | MORE
        if isinstance(config.target_modules, str):
            told |= REGEX
        return told, (self._folder / WEIGHTS_FILE).read_bytes()

    def attempt(self, rng: random.Random) -> None:
        config, weights = rng.choice(self._good)
        files = [self._folder / CONFIG_FILE, self._folder / WEIGHTS_FILE]
        put(files[0], json.dumps(config).encode())
        put(files[1], weights)
        kind = rng.random()
        if kind < 0.4:
            put(files[0], json_text(rng, mutate_tree(rng, config)))
        elif kind < 0.55:
            put(files[0], mutate_bytes(rng, json.dumps(config).encode()))
        elif kind < 0.9:
            put(files[1], mutate_safetensors(rng, weights))
        else:
            mutate_file(rng, rng.choice(files))
        before = listing(self._root)
        try:
            found = read_peft(self._folder, SPEC)
        finally:
            assert listing(self._root) == before
        check_weights(found.weights, found.shape, SPEC)
        assert all(a.dtype == np.float32 for pair in found.weights.values() for a in pair.values())

    def traces(self) -> list[str]:
        return [path.name for path in self._root.iterdir()]
