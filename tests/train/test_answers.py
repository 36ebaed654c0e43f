"""What is learnt of a conversation, as text: by a template's own marks against transformers, else by its renderings."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loquetier_jax.errors import DataError
from loquetier_jax.train.formats import parse_record
from loquetier_jax.train.tokenize import tokenize
from tests.train.chats import CHATS, TWO_TURNS, assistant, chat_tokenizer, tools_of, user

MARKED = ("llama3_training", "qwen2_5_training", "qwen3_training", "gemma_training", "gptoss_training")
HEADER = "<bos>{{ m.role }}\n"
OPENING = "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"


def learnt(tokenizer: Any, messages: list[dict[str, Any]], **columns: Any) -> str:
    record = parse_record({"messages": messages, **columns}, "data[0]")
    ids, learn = tokenize(record, tokenizer, completion_only=True, where="data[0]")
    return tokenizer.decode([i for i, one in zip(ids, learn, strict=True) if one])


@pytest.fixture
def with_template(tokenizer, monkeypatch):
    """Returns template -> the byte tokenizer with it."""

    def make(template: str) -> Any:
        monkeypatch.setattr(tokenizer, "chat_template", template)
        return tokenizer

    return make


@pytest.mark.parametrize("name", MARKED)
def test_a_templates_own_marks_are_what_transformers_takes_them_for(name: str) -> None:
    tokenizer = chat_tokenizer(name)
    messages = CHATS["thinking"] if name.startswith(("qwen3", "gptoss")) else TWO_TURNS
    got = tokenize(parse_record({"messages": messages}, ""), tokenizer, completion_only=True, where="")
    # gptoss reads "thinking", which not every version of transformers takes "reasoning_content" for.
    named = [{**m, "thinking": m["reasoning_content"]} if "reasoning_content" in m else m for m in messages]
    want = tokenizer.apply_chat_template(named, return_assistant_tokens_mask=True)
    assert got == (want["input_ids"], [bool(m) for m in want["assistant_masks"]])


@pytest.mark.parametrize("name", ["qwen3_training", "gptoss_training", "qwen3"])
def test_marks_of_messages_that_are_not_learnt_are_not_learnt(name: str) -> None:
    """A turn may have several marks, and none of them says whose it is."""
    tokenizer, chat = chat_tokenizer(name), CHATS["thinking"]
    first, last = learnt(tokenizer, [chat[0], chat[1], chat[2], {**chat[3], "weight": 0}]), learnt(tokenizer, chat)
    assert "Hello" in first and "Ciao" not in first and "They leave." not in first
    rest = learnt(tokenizer, [chat[0], {**chat[1], "train": False}, *chat[2:]])
    assert first + rest == last


def test_a_turn_without_marks_in_a_template_that_has_some_is_learnt(with_template) -> None:
    marked, plain = "{% generation %}{{ m.content }}<eot>{% endgeneration %}", "{{ m.content }}<eot>"
    turn = f"{HEADER}{{% if m.content == 'a' %}}{marked}{{% else %}}{plain}{{% endif %}}"
    tokenizer = with_template(f"{{% for m in messages %}}{turn}{{% endfor %}}{OPENING}")
    chat = [user("x"), assistant("a"), user("y"), assistant("b")]
    assert learnt(tokenizer, chat) == "a<eot>b<eot>"


NOT_PREFIXES = {
    # what closes the whole conversation closes no turn before its end
    "end of all": ("{{ m.content }}<eot>{% if loop.last %}<eos>{% endif %}", "Hello<eot>Ciao<eot><eos>"),
    # the first turns are shortened, but shown
    "shortened": ("{{ m.content[:4] if not loop.last else m.content }}<eot>", "Hell<eot>Ciao<eot>"),
    # behind its header, not at its words, an answer begins
    "numbered": ("{{ loop.revindex }}: {{ m.content }}<eot>", "3: Hello<eot>1: Ciao<eot>"),
    "repeated": ("{{ loop.revindex }}{{ m.content }}|{{ m.content }}<eot>", "3Hello|Hello<eot>1Ciao|Ciao<eot>"),
}


@pytest.mark.parametrize("case", NOT_PREFIXES)
def test_every_answer_of_a_template_that_rewrites_its_beginning_is_learnt(with_template, case: str) -> None:
    turn, want = NOT_PREFIXES[case]
    tokenizer = with_template(f"{{% for m in messages %}}{HEADER}{turn}{{% endfor %}}{OPENING}")
    assert learnt(tokenizer, TWO_TURNS) == want


@pytest.mark.parametrize("chat", ["multi-turn", "tools", "system", "assistant first"])
def test_what_the_generation_prompt_holds_is_not_learnt(chat: str) -> None:
    """Without thinking the prompt closes it already; answers that others follow have no such block."""
    columns = {"tools": tools_of(chat), "chat_template_kwargs": {"enable_thinking": False}}
    thinking = learnt(chat_tokenizer("qwen3"), CHATS[chat], tools=tools_of(chat))
    got = learnt(chat_tokenizer("qwen3"), CHATS[chat], **columns)
    assert "</think>" in thinking and got == thinking.replace("<think>\n\n</think>\n\n", "")


def test_a_template_that_refuses_beginnings_without_a_question(with_template) -> None:
    question = "{% if 'user' not in messages | map(attribute='role') %}{{ raise_exception('no question') }}{% endif %}"
    turns = f"{{% for m in messages %}}{HEADER}{{{{ m.content }}}}<eot>{{% endfor %}}"
    tokenizer = with_template(question + turns + OPENING)
    system = {"role": "system", "content": "s"}
    for first in ([], [system]):
        assert learnt(tokenizer, [*first, assistant("Welcome"), *TWO_TURNS]) == "Welcome<eot>Hello<eot>Ciao<eot>"
    with pytest.raises(DataError, match="no question"):
        learnt(tokenizer, [assistant("Welcome")])


def test_an_empty_answer_is_not_learnt(with_template) -> None:
    chat = [user("a"), assistant(""), user("b"), assistant("c")]
    for turn in ("{{ m.content }}<eot>", "{{ m.content }}<eot>{% if loop.last %}<eos>{% endif %}"):
        tokenizer = with_template(f"{{% for m in messages %}}{HEADER}{turn}{{% endfor %}}{OPENING}")
        assert learnt(tokenizer, chat).startswith("c<eot>")


def test_an_answer_that_the_template_leaves_out_is_refused(with_template) -> None:
    shown = "m.content if loop.last or m.role == 'user' else 'x'"
    tokenizer = with_template(f"{{% for m in messages %}}{{{{ {shown} }}}}<eot>{{% endfor %}}")
    with pytest.raises(DataError, match=r"data\[0\]: messages\[1\].content: the chat template drops it"):
        learnt(tokenizer, TWO_TURNS)


def test_a_token_that_merges_the_generation_prompt_with_the_answer_is_learnt() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, "ĠH", "ĠHi"])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "H"), ("ĠH", "i")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<eot>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eot>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '<eot>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    chat = [user("q"), assistant("Hi"), user("r"), assistant("Hi!")]
    assert learnt(tokenizer, chat) == " Hi<eot> Hi!<eot>"


def test_characters_of_several_bytes_and_of_no_meaning_are_learnt_whole(with_template) -> None:
    tokenizer = with_template(f"{{% for m in messages %}}{HEADER}{{{{ m.content }}}}<eot>{{% endfor %}}{OPENING}")
    words = "é👩‍👩‍👧\ue000 \n"
    assert learnt(tokenizer, [user(words), assistant(words), user(words), assistant(words)]) == f"{words}<eot>" * 2
