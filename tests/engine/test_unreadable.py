"""Adapters that live on disk only, folders that are gone, weights that are not numbers: each ends what asked for it."""

import shutil

import numpy as np
import pytest

from loquetier_jax import AdapterError
from tests.engine.engines import add_random_adapter, greedy, random_prompt


@pytest.fixture
def engine(make_engine):
    return make_engine(max_host_adapters=0)


def on_disk(engine, folder, count: int) -> list[str]:
    """`count` adapters, each loaded from a folder of its own."""
    names = [f"a{i}" for i in range(count)]
    for seed, name in enumerate(names):
        add_random_adapter(engine, "made", seed)
        engine.save_adapter("made", folder / name)
        engine.unload_adapter("made")
        engine.load_adapter(name, folder / name)
    return names


def test_more_adapters_than_pages_and_host_copies_serve_from_their_folders(engine, tmp_path):
    names = on_disk(engine, tmp_path, 12)  # on nine pages
    prompt = random_prompt(np.random.default_rng(0), 12)
    first = {name: engine.generate([prompt], name, greedy(4))[0].outputs[0].token_ids for name in names}
    again = {name: engine.generate([prompt], name, greedy(4))[0].outputs[0].token_ids for name in reversed(names)}
    assert first == again and len({tuple(ids) for ids in first.values()}) > 1
    assert [v.residency for v in engine.adapters.versions()].count("disk") >= 3
    engine.check_integrity()


def test_a_folder_that_is_gone_ends_its_own_requests_and_scores(engine, tmp_path):
    names = on_disk(engine, tmp_path, 3)
    prompt = random_prompt(np.random.default_rng(1), 12)
    shutil.rmtree(tmp_path / names[0])
    done = engine.generate([prompt, prompt], [names[0], names[1]], greedy(4))
    assert done[0].outputs[0].finish_reason == "error" and names[0] in done[0].outputs[0].stop_reason
    assert done[1].outputs[0].finish_reason == "length"
    with pytest.raises(AdapterError, match=names[0]):
        engine.log_probs([prompt], names[0])
    assert np.isfinite(engine.log_probs([prompt], names[1])[0]).all()
    engine.check_integrity()


def test_weights_that_are_nan_end_the_request_as_an_error(engine):
    add_random_adapter(engine, "sick", 3)
    version = engine.adapters.get("sick")
    weights = {k: dict(v) for k, v in engine.adapters.weights(version).items()}
    weights["layers.0.q_proj"]["lora_B"] = np.full_like(weights["layers.0.q_proj"]["lora_B"], np.nan)
    engine.add_adapter("sick", weights, version.shape, replace=True)
    sick, healthy = engine.generate([random_prompt(np.random.default_rng(2), 9)] * 2, ["sick", None], greedy(4))
    assert sick.outputs[0].finish_reason == "error" and "NaN" in sick.outputs[0].stop_reason
    assert healthy.outputs[0].finish_reason == "length"
    engine.check_integrity()
