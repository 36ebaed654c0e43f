"""Streamed text against decoding everything at once, stop strings against a search by character."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from loquetier_jax.serve.text import Detokenizer, StopChecker

quick = settings(deadline=None, max_examples=60)  # machines are shared: no deadline
TEXTS = st.text(st.sampled_from("ab é€😀\n\ufffd"), max_size=12) | st.text(max_size=8)


def stream(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [detokenizer.push(t) for t in ids] + [detokenizer.flush()]


@quick
@given(text=TEXTS, prompt=TEXTS)
def test_pieces_join_to_the_text(tokenizer: PreTrainedTokenizerFast, text: str, prompt: str) -> None:
    pieces = stream(Detokenizer(tokenizer, tokenizer.encode(prompt)), tokenizer.encode(text))
    assert "".join(pieces) == text


@quick
@given(ids=st.lists(st.integers(0, 258), max_size=24), skip=st.booleans())
def test_any_tokens_join_to_the_whole_decode(
    tokenizer: PreTrainedTokenizerFast, ids: list[int], skip: bool
) -> None:
    whole = tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert "".join(stream(Detokenizer(tokenizer, (), skip), ids)) == whole


def test_half_a_character_is_held_back(tokenizer: PreTrainedTokenizerFast) -> None:
    assert stream(Detokenizer(tokenizer), tokenizer.encode("a€b")) == ["a", "", "", "€", "b", ""]
    broken = tokenizer.encode("a€")[:-1]
    assert stream(Detokenizer(tokenizer), broken) == ["a", "", "", "\ufffd"]


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Words with a leading space mark, bytes as fallback: the decoder strips the first space, joins bytes."""
    words = ["<unk>", "\u2581Hello", "\u2581world", "!", "</s>"]
    vocab = {w: i for i, w in enumerate(words + [f"<0x{b:02X}>" for b in range(256)])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    steps = [
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    core.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def test_leading_space_depends_on_the_prompt() -> None:
    tokenizer = sentencepiece_like()
    hello, world, mark, end = 1, 2, 3, 4
    assert stream(Detokenizer(tokenizer), [hello, world, mark]) == ["Hello", " world", "!", ""]
    assert stream(Detokenizer(tokenizer, [hello]), [world, end, world]) == [" world", "", " world", ""]
    assert stream(Detokenizer(tokenizer, [hello], False), [end, world]) == ["</s>", " world", ""]


@quick
@given(text=st.lists(st.sampled_from(["Hello", "é", "€", "😀", "!"]), max_size=8))
def test_byte_fallback_joins_to_the_whole(text: list[str]) -> None:
    tokenizer = sentencepiece_like()
    words = {"Hello": [1], "!": [3]}
    ids = [i for w in text for i in words.get(w, [5 + b for b in w.encode()])]
    assert "".join(stream(Detokenizer(tokenizer), ids)) == tokenizer.decode(ids)


STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


def brute_force(text: str, stops: list[str], first: int) -> tuple[str, str | None]:
    """The first end of a stop string that ends after `first` characters; the longest one there."""
    for end in range(first + 1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@quick
@given(pieces=st.lists(st.text("ab\n", max_size=4), max_size=8), stops=STOPS, quiet=st.integers(0, 8))
def test_stop_is_found_wherever_the_pieces_break(pieces: list[str], stops: list[str], quiet: int) -> None:
    checker, out, stop = StopChecker(stops), "", None
    for i, piece in enumerate(pieces):
        text, stop = checker.push(piece, may_stop=i >= quiet)
        out += text
        if stop is not None:
            break
    out += checker.flush()
    assert (out, stop) == brute_force("".join(pieces), stops, len("".join(pieces[:quiet])))


@pytest.mark.parametrize(
    ("stops", "pieces", "released"),
    [
        (["END"], ["abE", "N", "x"], ["ab", "", "ENx"]),
        (["END"], ["abE", "ND", ""], ["ab", "", ""]),
        (["aab"], ["aa", "a", "b"], ["", "a", ""]),
        ([], ["abE", "N"], ["abE", "N"]),
    ],
)
def test_no_more_is_held_than_may_become_a_stop(
    stops: list[str], pieces: list[str], released: list[str]
) -> None:
    checker = StopChecker(stops)
    assert [checker.push(p)[0] for p in pieces] == released
