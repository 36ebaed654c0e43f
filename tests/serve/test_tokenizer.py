"""Loading a tokenizer from a folder, and prompts of every kind to ids."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from loquetier_jax.errors import ModelError, RequestError
from loquetier_jax.serve.tokenizer import encode_chat, encode_prompt, load_tokenizer

CHAT = [{"role": "user", "content": "hi"}]


def test_round_trip_through_a_folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("héllo €") == tokenizer.encode("héllo €")
    assert encode_chat(loaded, CHAT) == encode_chat(tokenizer, CHAT)


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected a local folder"):
        load_tokenizer("some-org/some-model")
    with pytest.raises(ModelError, match=f"cannot be loaded from '{tmp_path}'"):
        load_tokenizer(tmp_path)


def test_prompts_of_every_kind(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "<s>user: hi</s><s>assistant: "
    assert encode_prompt(tokenizer, "hi") == tuple(tokenizer.encode("hi"))
    assert encode_prompt(tokenizer, CHAT) == tuple(tokenizer.encode(text, add_special_tokens=False))
    assert encode_prompt(None, [3, 0, 5], vocab_size=6) == (3, 0, 5)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "at least one token"),
        ([], "at least one token"),
        ([1, 6], r"token id 6, expected ids in \[0, 6\)"),
        ([-1], "token id -1"),
        ([1, "a"], "expected text, token ids or chat messages"),
        (3, "expected text"),
        ([{"role": "user"}], r"messages\[0\]: got keys \['role'\]"),
    ],
)
def test_bad_prompts_are_refused(tokenizer: PreTrainedTokenizerFast, prompt: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        encode_prompt(tokenizer, prompt, vocab_size=6)


def test_what_needs_a_tokenizer_or_a_template_says_so(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(RequestError, match="no tokenizer"):
        encode_prompt(None, "hi")
    with pytest.raises(RequestError, match="no chat template"):
        encode_prompt(None, CHAT)
    with pytest.raises(RequestError, match="refused by the chat template"):
        encode_chat(tokenizer, [{"role": "user", "content": None}])


def test_host_modules_do_not_import_jax() -> None:
    modules = [
        f"loquetier_jax.{m}"
        for m in (
            "serve.params",
            "serve.request",
            "serve.output",
            "serve.text",
            "serve.tokenizer",
            "kv.pool",
            "kv.pages",
            "kv.slots",
        )
    ]
    code = f"import sys, {', '.join(modules)}; sys.exit('jax' in sys.modules or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
