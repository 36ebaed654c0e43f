"""Base and adapter as one model: transformers and PEFT say what its logits are."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loquetier_jax.adapters import merge
from loquetier_jax.adapters.lora import LoraConfig, LoraModule, LoraShape, init_weights, resolve_shape
from loquetier_jax.adapters.peft import write_peft
from loquetier_jax.cli import main
from loquetier_jax.errors import AdapterError, ModelError
from loquetier_jax.models.load import open_hf
from loquetier_jax.models.spec import DecoderSpec
from tests.models.checkpoints import hf_logits, hf_model, tiny_checkpoint

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

TOKENS = np.arange(3, 23, dtype=np.int32)[None]


def adapter_for(base: Path, **config: object) -> tuple[dict, object]:
    """Random weights, B included."""
    spec = DecoderSpec.from_hf(base)
    lora = LoraConfig(**({"r": 4, "lora_alpha": 12, "target_modules": "all-linear"} | config))
    shape = resolve_shape(lora, spec)
    weights = init_weights(shape, lora, spec, 1)
    rng = np.random.default_rng(2)
    for pair in weights.values():
        pair["lora_B"] = rng.normal(0, 0.3, pair["lora_B"].shape).astype(np.float32)
    return weights, shape


def peft_logits(base: Path, folder: Path) -> np.ndarray:
    from peft import PeftModel

    with torch.no_grad():
        model = PeftModel.from_pretrained(hf_model(base, dtype=torch.float32), folder)
        return model(torch.as_tensor(TOKENS, dtype=torch.int64)).logits.numpy()


CASES = {
    "llama": {"rank_pattern": {"up_proj": 7}, "use_rslora": True},
    "qwen3": {"target_modules": ["q_proj", "down_proj"]},
    "gemma": {},
}


@pytest.mark.parametrize("family", [pytest.param(f, marks=pytest.mark.slow) if f == "qwen3" else f for f in CASES])
def test_transformers_loads_it_to_the_logits_of_peft(family: str, tmp_path: Path) -> None:
    base = tiny_checkpoint(family, tmp_path / "base")
    weights, shape = adapter_for(base, **CASES[family])
    write_peft(tmp_path / "adapter", weights, shape, DecoderSpec.from_hf(base))
    merge.write_merged(tmp_path / "merged", base, weights, shape)
    expected = peft_logits(base, tmp_path / "adapter")
    assert np.abs(expected - hf_logits(base, TOKENS)).max() > 0.1
    np.testing.assert_allclose(hf_logits(tmp_path / "merged", TOKENS), expected, atol=1e-4)
    open_hf(tmp_path / "merged")  # and so do we


def test_dtypes_shards_and_what_lies_beside_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_checkpoint("llama", tmp_path / "base", dtype=torch.bfloat16)
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE.txt", "adapter_config.json", "README.md", "old.bin"):
        (base / name).write_text("{}")
    weights, shape = adapter_for(base, target_modules=["v_proj"])
    monkeypatch.setattr(merge, "MAX_SHARD", 10_000)
    merge.write_merged(tmp_path / "merged", base, weights, shape)
    files = {p.name for p in (tmp_path / "merged").iterdir() if not p.name.startswith("model")}
    beside = {"tokenizer.json", "chat_template.jinja", "LICENSE.txt", "config.json", "generation_config.json"}
    assert files == beside
    assert all((tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes() for name in beside)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    before, after = (
        {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
        for folder in (base, tmp_path / "merged")
    )
    assert before.keys() == after.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in after.values())
    for name, old in before.items():
        assert after[name].dtype == old.dtype == "bfloat16"
        assert np.array_equal(after[name], old) == ("v_proj" not in name)
    pair, module = weights["layers.1.v_proj"], shape.by_key["layers.1.v_proj"]
    name = "model.layers.1.self_attn.v_proj.weight"
    exact = before[name].astype(np.float64) + module.scaling * (pair["lora_B"].astype(np.float64) @ pair["lora_A"])
    np.testing.assert_allclose(after[name].astype(np.float64), exact, rtol=2**-8, atol=1e-6)


def test_a_refusal_leaves_nothing_behind(tmp_path: Path) -> None:
    base = tiny_checkpoint("llama", tmp_path / "base", num_hidden_layers=1)
    weights, shape = adapter_for(base)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(AdapterError, match="base exists"):
        merge.write_merged(base, base, weights, shape)
    with pytest.raises(AdapterError, match=r"folder: .*/new cannot be created: Not a directory"):
        merge.write_merged(base / "config.json" / "made" / "new", base, weights, shape)
    with pytest.raises(AdapterError, match=r"layers\.0\.down_proj.*missing"):
        merge.write_merged(tmp_path / "new", base, {}, shape)
    with pytest.raises(ModelError, match="no such folder"):
        merge.write_merged(tmp_path / "new", tmp_path / "nowhere", weights, shape)
    deep = LoraShape((*shape.modules, LoraModule(1, "q_proj", 4, 1.0)))
    with pytest.raises(AdapterError, match=r"layers\.1\.self_attn\.q_proj\.weight' is adapted, but .* has no tensor"):
        merge.write_merged(tmp_path / "new", base, weights | {"layers.1.q_proj": weights["layers.0.q_proj"]}, deep)
    weights["layers.0.o_proj"]["lora_A"][1, 1] = np.inf
    with pytest.raises(AdapterError, match=r"o_proj\.weight: not finite in float32"):
        merge.write_merged(tmp_path / "new", base, weights, shape)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_writes_a_model_or_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_checkpoint("llama", tmp_path / "base", num_hidden_layers=1)
    weights, shape = adapter_for(base)
    write_peft(tmp_path / "adapter", weights, shape, DecoderSpec.from_hf(base))
    named = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    wrapped = {k.replace("base_model.model.", "base_model.model._orig_mod."): v for k, v in named.items()}
    save_file(wrapped, tmp_path / "adapter" / "adapter_model.safetensors")
    options = [str(tmp_path / "adapter"), "--model", str(base), "--output-dir"]
    assert main(["export", *options, str(tmp_path / "merged"), "--merged", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"output_dir": str(tmp_path / "merged"), "merged": True}
    assert main(["export", *options, str(tmp_path / "plain")]) == 0
    assert load_file(tmp_path / "plain" / "adapter_model.safetensors").keys() == named.keys()
    np.testing.assert_allclose(
        hf_logits(tmp_path / "merged", TOKENS), peft_logits(base, tmp_path / "plain"), atol=1e-4
    )
    assert main(["export", *options, str(tmp_path / "merged"), "--merged"]) == 2
    assert "expected a new or empty folder" in capsys.readouterr().err
