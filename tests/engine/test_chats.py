"""Chats as the engine takes them: arguments of the template reach it by every call, and what training ends, ends."""

import pytest

from loquetier_jax import SamplingParams
from loquetier_jax.errors import RequestError
from loquetier_jax.tiny.tokenizer import build_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{{ tools | tojson if tools }}{{ 'no' if enable_thinking is false }}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
ARGUMENTS = {"tools": [{"name": "f"}], "chat_template_kwargs": {"enable_thinking": False}}
SHORT = SamplingParams(temperature=0, max_tokens=2)


@pytest.fixture
def engine(tiny_engine, monkeypatch):
    monkeypatch.setattr(tiny_engine.tokenizer, "chat_template", TEMPLATE)
    return tiny_engine


def test_arguments_of_the_template_reach_it_by_every_call(engine):
    text = [{"role": "user", "content": "ab"}]
    chosen = {"tools": ARGUMENTS["tools"], "enable_thinking": False}
    wanted = engine.tokenizer.apply_chat_template(text, add_generation_prompt=True, return_dict=False, **chosen)
    assert engine.submit(CHAT, None, SHORT, **ARGUMENTS).requests[0].prompt_ids == tuple(wanted)
    (output,) = engine.generate([CHAT], None, SHORT, **ARGUMENTS)
    assert output.prompt_token_ids == wanted
    pieces = list(engine.stream(CHAT, None, SHORT, **ARGUMENTS))
    assert [t for piece in pieces for t in piece.token_ids] == output.outputs[0].token_ids


def test_what_a_template_cannot_take_is_refused_and_leaves_nothing(engine):
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    for call in (engine.submit, engine.stream, lambda prompt, **k: engine.generate([CHAT, prompt], **k)):
        with pytest.raises(RequestError, match=r"messages\[0\]\.content\[0\]: got .*image_url"):
            call(image)
        with pytest.raises(RequestError, match="chat_template_kwargs: got 'thinking'"):
            call(CHAT, chat_template_kwargs={"thinking": False})
        with pytest.raises(RequestError, match=r"tools: got .*, expected it beside chat messages"):
            call("ab", tools=ARGUMENTS["tools"])
    assert not engine.loop.serving.waiting


def test_the_tokenizers_end_token_ends_a_request_beside_those_of_the_configs(engine, monkeypatch):
    """Training ends every text with it."""
    tokenizer = build_tokenizer()
    tokenizer.eos_token = "<|reserved_0|>"
    monkeypatch.setattr(engine.requests, "tokenizer", tokenizer)
    for end in (tokenizer.eos_token_id, *engine.spec.eos_token_ids):
        params = SamplingParams(temperature=0, max_tokens=8, logit_bias={end: 100.0})
        (completion,) = engine.generate(["a"], None, params)[0].outputs
        assert (completion.finish_reason, completion.stop_reason, completion.token_ids) == ("stop", None, [end])
