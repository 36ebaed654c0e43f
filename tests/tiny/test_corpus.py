"""The generated text: the same everywhere, ASCII, and true where it states a result."""

import hashlib
import json
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loquetier_jax.errors import DataError
from loquetier_jax.tiny import corpus, skills, words
from loquetier_jax.tiny.tokenizer import ASSISTANT, BOS, END, EOS, SYSTEM, USER


def digest(seed: int) -> str:
    text = json.dumps(list(corpus.rows(seed, 20, 256)))
    return hashlib.sha256(text.encode()).hexdigest()


def test_rows_are_the_ones_the_weights_were_trained_on() -> None:
    # A changed corpus needs changed weights: train again, then write the new digest here.
    assert digest(0) == "9263bf666dce5e33aa11fdefc9950f53bbd7d654809c2b1d8df38b7f39a14b34"
    assert digest(1) != digest(0)


def test_rows_do_not_depend_on_the_process() -> None:
    # A set or a salted hash in the generator would show as another order in another process.
    code = (
        "import hashlib, json; from loquetier_jax.tiny import corpus;"
        "print(hashlib.sha256(json.dumps(list(corpus.rows(0, 20, 256))).encode()).hexdigest())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == digest(0)


def test_corpus_imports_no_jax() -> None:
    code = "import sys; from loquetier_jax.tiny import corpus, skills; print('jax' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


@settings(max_examples=50, deadline=None)
@given(st.integers())
def test_documents_are_well_formed(seed: int) -> None:
    ids = corpus.document(random.Random(seed))
    assert ids[0] == BOS and ids[-1] == EOS
    inner = ids[1:-1]
    assert BOS not in inner and EOS not in inner
    assert all(t < 128 or t in (SYSTEM, USER, ASSISTANT, END) for t in inner)
    if USER in inner:
        assert inner.count(USER) == inner.count(ASSISTANT)
        assert inner.count(END) == 2 * inner.count(USER) + inner.count(SYSTEM)
        assert inner[-1] == END


@settings(max_examples=50, deadline=None)
@given(st.integers())
def test_answers_are_right(seed: int) -> None:
    rng = random.Random(seed)
    sum_ = corpus.exchange(rng, "arithmetic")
    assert eval(sum_.prompt.rstrip("=")) == int(sum_.completion)  # our own text: digits and an operator
    word = corpus.exchange(rng, "reverse")
    assert word.prompt.split()[1][::-1] == word.completion.strip()
    letters = corpus.exchange(rng, "sort")
    assert sorted(letters.prompt.split()[1]) == list(letters.completion.strip())
    table = corpus.exchange(rng, "lookup")
    key = table.prompt.split("lookup: ")[1].split()[0]
    assert f"{key}={table.completion.strip()}" in table.prompt.replace(",", "").split()
    told = corpus.exchange(rng, "context")
    assert told.completion.strip() in told.prompt
    record = corpus.exchange(rng, "record")
    assert json.loads(record.completion)["name"] == record.prompt.split()[0]


def test_every_skill_occurs() -> None:
    rng = random.Random(0)
    for name in corpus.SKILLS:
        exchange = corpus.exchange(rng, name)
        assert exchange.prompt and exchange.completion.strip() and exchange.question


def test_names_are_different() -> None:
    for items in (words.NAMES, words.CITIES, words.OBJECTS, words.WORDS):
        assert len(set(items)) == len(items)


@pytest.mark.parametrize("name", sorted(skills.STYLES))
def test_dataset_is_deterministic_and_asks_the_same_of_every_skill(name: str) -> None:
    rows = skills.dataset(name, 40, seed=3)
    assert rows == skills.dataset(name, 40, seed=3)
    assert rows[:10] == skills.dataset(name, 10, seed=3)
    assert rows != skills.dataset(name, 40, seed=4)
    assert [r["prompt"] for r in rows] == [r["prompt"] for r in skills.dataset("pirate", 40, seed=3)]
    assert all(r["prompt"].endswith("\nA:") and r["completion"].startswith(" ") for r in rows)


def test_styles_differ_in_every_row() -> None:
    columns = [[r["completion"] for r in skills.dataset(name, 40, seed=0)] for name in skills.STYLES]
    assert all(len(set(row)) == len(skills.STYLES) for row in zip(*columns, strict=True))
    assert all("subject" in json.loads(r["completion"]) for r in skills.dataset("json", 40, seed=0))


def test_chat_rows_hold_the_same_answers() -> None:
    plain, chat = skills.dataset("pirate", 20, 0), skills.dataset("pirate", 20, 0, chat=True)
    assert [r["completion"].strip() for r in plain] == [r["messages"][1]["content"] for r in chat]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(DataError, match=r"'parrot'.*pirate"):
        skills.dataset("parrot", 1, 0)
    with pytest.raises(DataError, match="n: got 0"):
        skills.dataset("pirate", 0, 0)
