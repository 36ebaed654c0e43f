"""Folders whose names show how they were trained: torch.compile, DDP, FSDP, a raw state dict."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loquetier_jax.adapters.peft import CONFIG_FILE, WEIGHTS_FILE, read_peft, write_peft
from loquetier_jax.errors import AdapterError
from loquetier_jax.models.spec import MODULES
from tests.adapters.cases import MIXED, SPEC, assert_same, our_deltas, peft_deltas, random_weights

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_peft(tmp_path / "adapter", random_weights(MIXED), MIXED, SPEC)
    return tmp_path / "adapter"


def rewrite(folder: Path, name: Callable[[str], str] = str, **fields: object) -> Path:
    """Renames the tensors of a folder and changes keys of its config."""
    tensors = {name(key): value for key, value in load_file(folder / WEIGHTS_FILE).items()}
    save_file(tensors, folder / WEIGHTS_FILE)
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | fields))
    return folder


RENAMED = {
    "compiled model": lambda k: k.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled PEFT model": lambda k: f"_orig_mod.{k}",
    "compiled layers": lambda k: k.replace(".self_attn", "._orig_mod.self_attn").replace(".mlp", "._orig_mod.mlp"),
    "DDP": lambda k: f"module.{k}",
    "DDP of a compiled model": lambda k: f"module._orig_mod.{k}",
    "FSDP and activation checkpointing": lambda k: k.replace(
        ".self_attn", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn"
    ),
    "name of the adapter": lambda k: k.replace(".weight", ".default.weight"),
    "another name of the adapter": lambda k: k.replace(".weight", ".sql-v2.weight"),
    "prefix twice": lambda k: f"base_model.model.{k}",
    "no prefix": lambda k: k.removeprefix("base_model.model."),
}


@pytest.mark.parametrize("case", RENAMED)
def test_names_with_wrappers_are_the_same_adapter(folder: Path, case: str) -> None:
    before = read_peft(folder, SPEC)
    after = read_peft(rewrite(folder, RENAMED[case]), SPEC)
    assert after.shape == before.shape
    assert all(np.array_equal(after.weights[k][n], a) for k, w in before.weights.items() for n, a in w.items())


def compiled(model):
    """What torch.compile returns, as far as names go, without the import of the compiler."""
    from torch import nn

    class OptimizedModule(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._orig_mod = model

        def __getattr__(self, name: str):
            return getattr(model, name) if name != "_orig_mod" else super().__getattr__(name)

    return OptimizedModule()


@pytest.mark.parametrize("saved", ["by PEFT", "as a state dict"])
def test_a_compiled_model_that_peft_saved(base, tmp_path: Path, saved: str) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    names = [f"_orig_mod.model.layers.{i}.self_attn.q_proj" for i in range(2)]
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=[*names, "down_proj"], rank_pattern={names[1]: 3})
    model = get_peft_model(compiled(base()), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    if saved == "as a state dict":
        tensors = {k: v.numpy() for k, v in model.state_dict().items() if "lora_" in k}
        assert all(".default." in k and "_orig_mod." in k for k in tensors)
        save_file(tensors, tmp_path / WEIGHTS_FILE)
    _, shape, weights = read_peft(tmp_path, SPEC)
    assert_same(our_deltas(weights, shape), peft_deltas(model))


def test_two_adapters_in_a_file_are_refused(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file(tensors | {k.replace(".weight", ".b.weight"): v for k, v in tensors.items()}, folder / WEIGHTS_FILE)
    with pytest.raises(AdapterError, match=r"lora_A\.b\.weight.*expected one lora_A per module"):
        read_peft(folder, SPEC)


def test_a_resized_embedding_is_named_as_one(base, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = base()
    model.resize_token_embeddings(SPEC.vocab_size + 8, mean_resizing=False)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    whole = {k: v for k, v in tensors.items() if "lora_" not in k}
    assert [k.rsplit(".", 2)[-2] for k in sorted(whole)] == ["lm_head", "embed_tokens"]
    for name in whole:
        save_file({k: v for k, v in tensors.items() if k == name or "lora_" in k}, tmp_path / WEIGHTS_FILE)
        with pytest.raises(AdapterError, match=rf"{name}.*vocabulary resize.*merge_and_unload"):
            read_peft(tmp_path, SPEC)


def test_keys_that_say_how_it_was_trained_are_taken(folder: Path) -> None:
    shape = read_peft(folder, SPEC).shape
    swift = {"lora_dtype": None, "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-6}
    assert read_peft(rewrite(folder, **swift), SPEC).shape == shape


def test_a_byte_order_mark_is_no_harm_and_depth_is_no_crash(folder: Path) -> None:
    shape = read_peft(folder, SPEC).shape
    path = folder / CONFIG_FILE
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    assert read_peft(folder, SPEC).shape == shape
    path.write_text("[" * 100_000)
    with pytest.raises(AdapterError, match=rf"{CONFIG_FILE}: not JSON"):
        read_peft(folder, SPEC)


@pytest.mark.parametrize("expression", [r"model\.language_model\.layers\.\d+\..*_proj", "(.*)*!"])
def test_an_expression_for_other_names_leaves_the_modules_to_the_tensors(
    folder: Path, expression: str, caplog: pytest.LogCaptureFixture
) -> None:
    rank = {f"model.layers.{m.layer}.{MODULES[m.target]}": m.r for m in MIXED.modules}
    right = read_peft(folder, SPEC)
    found = read_peft(rewrite(folder, target_modules=expression, rank_pattern=rank), SPEC)
    assert found.shape == right.shape
    for key, pair in right.weights.items():
        for name, array in pair.items():
            np.testing.assert_array_equal(found.weights[key][name], array)
    assert "target_modules matches no module of this base" in caplog.text


def test_an_expression_that_matches_nothing_is_refused_where_tensors_do_not_help(folder: Path) -> None:
    nowhere = rewrite(folder, lambda name: name.replace("layers.", "blocks."), target_modules="(.*)*!")
    with pytest.raises(AdapterError, match=r"'\(\.\*\)\*!' .*matches no module"):
        read_peft(nowhere, SPEC)
