"""Token ids in every form people have them: lists, arrays, tensors, numbers of numpy, vLLM's mappings."""

import numpy as np
import pytest

from loquetier_jax.errors import RequestError
from loquetier_jax.serve.prompts import prompts_of
from loquetier_jax.serve.tokenizer import encode_prompt
from loquetier_jax.token_ids import are_token_ids, listed, plain_prompt

FORMS = [
    [1, 2, 3],
    (1, 2, 3),
    range(1, 4),
    np.array([1, 2, 3]),
    np.array([1, 2, 3], np.uint8),
    [np.int32(1), 2, np.int64(3)],
    (np.int32(1), np.array(2), 3),
    {"prompt_token_ids": [1, 2, 3]},
    {"prompt_token_ids": np.array([1, 2, 3])},
]


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_every_form_is_the_same_prompt(form):
    assert encode_prompt(None, plain_prompt(form), 10) == (1, 2, 3)
    assert [encode_prompt(None, one, 10) for one in prompts_of([form, form], "prompts")] == [(1, 2, 3)] * 2


def test_arrays_of_other_libraries():
    jnp, torch = pytest.importorskip("jax.numpy"), pytest.importorskip("torch")
    for form in (jnp.array([1, 2, 3]), torch.tensor([1, 2, 3]), list(torch.tensor([1, 2, 3]))):
        assert listed(form) == [1, 2, 3]


def test_a_matrix_is_a_list_of_prompts():
    assert prompts_of(np.array([[1, 2], [3, 4]]), "prompts") == [[1, 2], [3, 4]]
    assert prompts_of({"prompt": "a"}, "prompts") == ["a"]
    assert prompts_of([{"prompt": "a"}, "b"], "prompts") == ["a", "b"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2, 3], r"prompts: got \[1, 2, 3\], expected a list of token id lists: \[ids\]"),
        (np.array([1, 2, 3]), r"prompts: got \[1, 2, 3\], expected a list of token id lists"),
        ([{"role": "user", "content": "a"}], r"prompts: got .*, expected a list of chats: \[messages\]"),
        ({"role": "user", "content": "a"}, "prompts: got .*, expected a string or a list of strings"),
        ({"input_ids": [1], "attention_mask": [1]}, "prompts: got .*, expected a string or a list of strings"),
        (b"ab", "prompts: got b'ab', expected a string or a list of strings"),
        (5, "prompts: got 5, expected a string or a list of strings"),
    ],
)
def test_what_is_no_list_of_prompts_is_named(value, message):
    with pytest.raises(RequestError, match=f"^{message}"):
        prompts_of(value, "prompts")


NONE = [np.array([1.0, 2.0]), np.array([[1, 2]]), np.array(3), [True], [np.bool_(True)], [1, 2.5]]


@pytest.mark.parametrize("form", NONE, ids=repr)
def test_what_is_no_prompt_stays_refused(form):
    assert not are_token_ids(plain_prompt(form))
    with pytest.raises(RequestError, match=r"^prompt: got .*, expected text, token ids"):
        encode_prompt(None, plain_prompt(form), 10)
