"""A head that the config ties and the files do not: what transformers makes of it is what we make of it."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from loquetier_jax.errors import ModelError
from loquetier_jax.models.load import EMBEDDING, HEAD, load_hf
from loquetier_jax.models.spec import DecoderSpec
from tests.models.checkpoints import draw_tensors, hf_model, tiny_checkpoint

pytest.importorskip("torch")


def folder_with(tmp_path: Path, family: str, head: str) -> Path:
    """A folder of a tied family in one file, with `head`: "same", "other", "alone" (no embedding) or "none"."""
    folder = tiny_checkpoint(family, tmp_path / family, hidden_size=24, head_dim=8, num_hidden_layers=1)
    tensors = draw_tensors(DecoderSpec.from_hf(folder))
    embedding = tensors[EMBEDDING]
    if head != "none":
        tensors[HEAD] = np.roll(embedding, 1, axis=0) if head == "other" else embedding
    if head == "alone":
        del tensors[EMBEDDING]
    for file in folder.glob("model*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("head", ["same", "other", "alone", "none"])
@pytest.mark.parametrize("family", ["llama_tied", "gemma"])
def test_the_files_say_whether_the_head_is_tied(
    family: str, head: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_with(tmp_path, family, head)
    with caplog.at_level(logging.WARNING):
        spec, params = load_hf(folder, "float32")
    assert spec.tie_word_embeddings == (head != "other")
    assert ("lm_head" in params) == (head == "other")
    assert ("differs from" in caplog.text) == (head == "other")
    theirs = hf_model(folder)
    ours = params["embed_tokens"], params["lm_head"].w.T if "lm_head" in params else params["embed_tokens"]
    for weight, module in zip(ours, (theirs.get_input_embeddings(), theirs.get_output_embeddings()), strict=True):
        np.testing.assert_array_equal(weight, module.weight.detach().numpy())


def test_a_tied_head_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "llama_tied", "other")
    tensors = draw_tensors(DecoderSpec.from_hf(folder)) | {HEAD: np.zeros((97, 24), np.float32)}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"lm_head\.weight: has shape \(97, 24\)"):
        load_hf(folder, "float32")


def test_a_byte_order_mark_before_the_config_is_no_harm(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "llama_tied", "none")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text("\ufeff" + text, encoding="utf-8")
    assert DecoderSpec.from_hf(folder) == DecoderSpec.from_hf(json.loads(text) | {"eos_token_id": 2})
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match=r"config\.json: not valid JSON"):
        DecoderSpec.from_hf(folder)
