"""Loading a tokenizer from a folder, and prompts of every kind to ids."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from loquetier_jax.errors import ModelError, RequestError
from loquetier_jax.serve.tokenizer import encode_chat, encode_prompt, end_token_ids, load_tokenizer
from loquetier_jax.tiny import base_path
from loquetier_jax.train.formats import Completion, Text
from loquetier_jax.train.tokenize import tokenize

CHAT = [{"role": "user", "content": "hi"}]


def test_round_trip_through_a_folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("héllo €") == tokenizer.encode("héllo €")
    assert encode_chat(loaded, CHAT) == encode_chat(tokenizer, CHAT)


def test_a_generic_tokenizer_is_loaded_as_transformers_does(tmp_path: Path) -> None:
    """Without the import of torch that AutoTokenizer needs."""
    auto, own = AutoTokenizer.from_pretrained(base_path(), local_files_only=True), load_tokenizer(base_path())
    assert type(own) is type(auto) and own.get_vocab() == auto.get_vocab()
    assert own.init_kwargs.keys() == auto.init_kwargs.keys() and own.chat_template == auto.chat_template
    assert own.special_tokens_map == auto.special_tokens_map and encode_chat(own, CHAT) == encode_chat(auto, CHAT)
    code = f"import sys; from {load_tokenizer.__module__} import *; load_tokenizer({str(base_path())!r})"
    seen = subprocess.run([sys.executable, "-c", f"{code}; print('torch' in sys.modules)"], stdout=subprocess.PIPE)
    assert seen.stdout.decode().strip() == "False"


@pytest.mark.parametrize("text", ["[]", "{", '"x"'])
def test_a_damaged_configuration_is_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, text: str) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(ModelError, match=f"cannot be loaded from '{tmp_path}'"):
        load_tokenizer(tmp_path)


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


@pytest.fixture
def with_ends(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerFast:
    """The byte tokenizer as one that puts <s> in front of every text and </s> behind it."""
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ends = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", begin), ("</s>", end)])
    monkeypatch.setattr(tokenizer.backend_tokenizer, "post_processor", ends)
    assert tokenizer.encode("hi") == [begin, *tokenizer.encode("hi", add_special_tokens=False), end]
    return tokenizer


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("hi", "<s>hi"),
        ("", "<s>"),
        ("<s>hi", "<s>hi"),  # what a chat template has written already
        ("<s><s>hi", "<s><s>hi"),  # the user's own doing
        ("hi</s>", "<s>hi</s>"),
        ("<s>user: hi</s><s>assistant: ", "<s>user: hi</s><s>assistant: "),
    ],
)
def test_text_begins_once_and_does_not_end(with_ends: PreTrainedTokenizerFast, text: str, want: str) -> None:
    wanted = with_ends.encode(want, add_special_tokens=False)
    assert list(encode_prompt(with_ends, text)) == wanted
    for record in (Text(text or " "), Completion(text, "yo")):  # and in training, where it ends once
        ids, _ = tokenize(record, with_ends, completion_only=True, where="")
        assert ids[: len(wanted)] == wanted
        assert ids.count(with_ends.eos_token_id) == want.count("</s>") + (ids[-2:] != wanted[-2:])
        assert ids[-1] == with_ends.eos_token_id


def test_end_tokens_are_those_of_the_configs_and_of_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    own = tokenizer.eos_token_id
    assert end_token_ids(tokenizer, (3, 5), vocab_size=own + 1) == {3, 5, own}
    assert end_token_ids(tokenizer, (3, 5), vocab_size=5) == {3}
    assert end_token_ids(None, (3,), vocab_size=9) == {3}


def test_arrays_and_numpy_scalars_are_token_ids() -> None:
    for prompt in (np.array([3, 0], np.int32), [np.int64(3), np.uint8(0)]):
        assert encode_prompt(None, prompt, vocab_size=6) == (3, 0)
    for prompt in (np.array([0.5]), np.array([[1]]), np.array([True]), np.array(3)):
        with pytest.raises(RequestError, match="expected text, token ids or chat messages"):
            encode_prompt(None, prompt)


def test_arguments_of_a_template_beside_no_chat_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    for arguments in ({"tools": []}, {"chat_template_kwargs": {}}):
        with pytest.raises(RequestError, match=f"{next(iter(arguments))}: got .* chat messages as the prompt"):
            encode_prompt(tokenizer, "hi", **arguments)


def test_host_modules_do_not_import_jax() -> None:
    names = ["request", "output", "handle", "text", "messages", "chat_template", "tokenizer", "kv", "prompts"]
    modules = ["loquetier_jax.sampling_params", "loquetier_jax.pool", *(f"loquetier_jax.serve.{n}" for n in names)]
    code = f"import sys, {', '.join(modules)}; sys.exit('jax' in sys.modules or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
