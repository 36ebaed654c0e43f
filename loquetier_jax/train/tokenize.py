"""Converts records to token ids and a loss mask with a Hugging Face tokenizer."""

from datetime import datetime
from typing import Any

import numpy as np

from loquetier_jax.errors import DataError
from loquetier_jax.serve.chat_template import ChatTemplate
from loquetier_jax.serve.messages import ChatError
from loquetier_jax.serve.tokenizer import encode_text
from loquetier_jax.train.answers import find_answers
from loquetier_jax.train.formats import Chat, Completion, Record, Text


def tokenize(
    record: Record, tokenizer: Any, *, completion_only: bool, where: str, now: datetime | None = None
) -> tuple[list[int], list[bool]]:
    """Token ids of a record, and which of them have loss.

    Text and completions start as in serving (`serve.tokenizer.encode_text`) and end with the tokenizer's
    end-of-sequence token, which has loss. Chats are rendered by the same code as in serving; every answer has loss
    (`answers.find_answers`), and so do the tokens that close it. A token that spans the end of the generation prompt
    and the start of an answer has loss.

    Args:
        record: As returned by `formats.parse_record`.
        tokenizer: A transformers tokenizer; chats need its chat template.
        completion_only: If False, every token has loss.
        where: File and line, for error messages.
        now: Date and time for templates that print them, so that tokens depend only on the record; None means now.

    Returns:
        (ids, learn), of equal length. learn[0] has no effect, because nothing precedes the first token.

    Raises:
        DataError: the chat template is missing, refuses the messages or drops part of them, or text has a lone
            surrogate.
    """
    try:
        if isinstance(record, Text):
            ids = _ended(encode_text(tokenizer, record.text), tokenizer)
            return ids, [True] * len(ids)
        ids, learn = (
            _completion(record, tokenizer) if isinstance(record, Completion) else _chat(record, tokenizer, now)
        )
    except ChatError as error:
        raise DataError(f"{where}: {error}") from error
    except (TypeError, UnicodeError) as error:  # a lone surrogate, which JSON's "\ud800" may produce
        raise DataError(f"{where}: the tokenizer refuses the text: {error}") from error
    return ids, learn if completion_only else [True] * len(ids)


def _completion(record: Completion, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Tokenizes both parts together, or separately if a token would straddle the boundary."""
    prompt = encode_text(tokenizer, record.prompt)
    ids = encode_text(tokenizer, record.prompt + record.completion)
    if ids[: len(prompt)] != prompt:
        ids = prompt + tokenizer(record.completion, add_special_tokens=False, verbose=False)["input_ids"]
    ids = _ended(ids, tokenizer)
    return ids, [i >= len(prompt) for i in range(len(ids))]


def _chat(record: Chat, tokenizer: Any, now: datetime | None) -> tuple[list[int], list[bool]]:
    kwargs = {"tools": record.tools, "chat_template_kwargs": record.chat_template_kwargs, "now": now}
    text, answers = find_answers(ChatTemplate(tokenizer, **kwargs), record.messages, record.train)
    if not tokenizer.is_fast:
        raise ChatError("messages: a fast tokenizer is needed, which gives the offsets of its tokens in the text")
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    start, stop = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
    learn = np.zeros(len(start), bool)
    for answer in answers:
        learn |= answer.learns(start, stop)
    return list(encoded["input_ids"]), learn.tolist()


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    eos = tokenizer.eos_token_id
    return ids if eos is None or (ids and ids[-1] == eos) else [*ids, eos]
