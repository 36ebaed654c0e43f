"""The byte tokenizer: ids are bytes, any text survives, the committed files are what the code builds."""

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from loquetier_jax.tiny import base_path, tokenizer

COMMITTED = AutoTokenizer.from_pretrained(base_path())


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_ids_are_bytes_and_decode_back(text: str) -> None:
    text = text.replace("<|", "< |")  # not a special token
    ids = COMMITTED(text, add_special_tokens=False).input_ids
    assert ids == list(text.encode())
    assert COMMITTED.decode(ids) == text


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=2), st.data())
def test_text_may_be_cut_anywhere(text: str, data: st.DataObject) -> None:
    text = text.replace("<|", "< |")
    cut = data.draw(st.integers(0, len(text)))
    if text[cut - 1 : cut + 1] == "<|":
        return
    encode = lambda part: COMMITTED(part, add_special_tokens=False).input_ids  # noqa: E731
    assert encode(text[:cut]) + encode(text[cut:]) == encode(text)


def test_special_tokens() -> None:
    assert len(COMMITTED) == tokenizer.VOCAB_SIZE
    assert COMMITTED.convert_tokens_to_ids(list(tokenizer.SPECIAL_TOKENS)) == list(range(256, 263))
    assert (COMMITTED.pad_token_id, COMMITTED.bos_token_id, COMMITTED.eos_token_id) == (256, 257, 258)
    assert COMMITTED("hi").input_ids == [257, 104, 105]
    assert all(COMMITTED.decode([i]) for i in range(tokenizer.VOCAB_SIZE))


def test_chat_template_is_the_form_of_the_corpus() -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "So"},
    ]
    ids = COMMITTED.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    t = tokenizer
    asked = [t.SYSTEM, *b"S", t.END, t.USER, *b"Hi", t.END]
    assert ids == [t.BOS, *asked, t.ASSISTANT, *b"Yo", t.END, t.USER, *b"So", t.END, t.ASSISTANT]
    masked = COMMITTED.apply_chat_template(
        messages[:3], return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
    )
    trained = [i for i, m in zip(masked["input_ids"], masked["assistant_masks"], strict=True) if m]
    assert trained == [*b"Yo", t.END]


def test_committed_files_are_what_the_code_builds(tmp_path: Path) -> None:
    tokenizer.save_tokenizer(tmp_path)
    for file in sorted(tmp_path.iterdir()):
        assert file.read_text() == (base_path() / file.name).read_text(), file.name
