"""Records to token ids and a loss mask, through a Hugging Face tokenizer."""

from datetime import datetime
from typing import Any

import jinja2
from transformers.utils import chat_template_utils

from loquetier_jax.errors import DataError
from loquetier_jax.jobs.formats import Chat, Completion, Record, Text


def tokenize(
    record: Record, tokenizer: Any, *, completion_only: bool, where: str, now: datetime | None = None
) -> tuple[list[int], list[bool]]:
    """Token ids of a record, and which of them are to be predicted.

    Text and completions end with the tokenizer's end-of-sequence token, which is learnt; a chat ends as its
    template says, and the tokens that close an assistant's turn are learnt with it.

    Args:
        record: What `formats.parse_record` returned.
        tokenizer: A transformers tokenizer; a chat needs its chat template.
        completion_only: False: every token is learnt.
        where: File and line, for messages.
        now: The time for chat templates that print the date; None is the present.

    Returns:
        (ids, learn), of equal length. learn[0] has no effect: nothing precedes the first token.

    Raises:
        DataError: the chat template is missing, refuses the messages, or does not render a conversation as a
            continuation of its own beginning, so that the assistant's tokens cannot be told apart; text with
            half a surrogate pair.
    """
    try:
        if isinstance(record, Text):
            ids = _ended(_encode(tokenizer, record.text), tokenizer)
            return ids, [True] * len(ids)
        ids, learn = (
            _completion(record, tokenizer) if isinstance(record, Completion) else _chat(record, tokenizer, where, now)
        )
    except (TypeError, UnicodeError) as error:  # half a surrogate pair: JSON's "\ud800" alone
        raise DataError(f"{where}: the tokenizer refuses the text: {error}") from error
    return ids, learn if completion_only else [True] * len(ids)


def _completion(record: Completion, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Tokens of both parts together, unless a token straddles the boundary: then each part on its own."""
    prompt = _encode(tokenizer, record.prompt)
    ids = _encode(tokenizer, record.prompt + record.completion)
    if ids[: len(prompt)] != prompt:
        ids = prompt + tokenizer(record.completion, add_special_tokens=False)["input_ids"]
    ids = _ended(ids, tokenizer)
    return ids, [i >= len(prompt) for i in range(len(ids))]


def _chat(record: Chat, tokenizer: Any, where: str, now: datetime | None) -> tuple[list[int], list[bool]]:
    """Templates every beginning of the conversation; what a learnt message adds to it is learnt."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"{where}: messages need a tokenizer with a chat template, and this one has none")
    whole = _template(tokenizer, record, len(record.messages), where, now)
    learn = [False] * len(whole)
    for i, train in enumerate(record.train):
        if not train:
            continue
        # the generation prompt ("<assistant>:") is given when serving, so it is not learnt
        start = _template(tokenizer, record, i, where, now, add_generation_prompt=True) if i else []
        stop = _template(tokenizer, record, i + 1, where, now)
        if whole[: len(start)] != start or whole[: len(stop)] != stop or len(stop) < len(start):
            raise DataError(
                f"{where}: messages[{i}]: the chat template does not render the whole conversation as a "
                "continuation of its first messages, so the assistant's tokens cannot be told apart; "
                "split the conversation here"
            )
        learn[len(start) : len(stop)] = [True] * (len(stop) - len(start))
    return whole, learn


def _template(
    tokenizer: Any,
    record: Chat,
    count: int,
    where: str,
    now: datetime | None,
    add_generation_prompt: bool = False,
) -> list[int]:
    tools = None if record.tools is None else list(record.tools)
    try:
        # Private, but what apply_chat_template renders with, sandbox included: that one takes no clock.
        template = chat_template_utils._compile_jinja_template(tokenizer.get_chat_template(tools=tools))
        text = template.render(
            messages=list(record.messages[:count]),
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            strftime_now=(now or datetime.now()).strftime,
            **tokenizer.special_tokens_map,
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise DataError(f"{where}: the chat template refuses the first {count} messages: {error}") from error
    # the template holds the special tokens itself
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Ids with the tokenizer's own leading special tokens; an end token it adds is taken off again."""
    ids = list(tokenizer(text)["input_ids"])
    eos = tokenizer.eos_token_id
    if ids and eos is not None and ids[-1] == eos and not text.endswith(tokenizer.eos_token):
        ids.pop()
    return ids


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    eos = tokenizer.eos_token_id
    return ids if eos is None or (ids and ids[-1] == eos) else [*ids, eos]
