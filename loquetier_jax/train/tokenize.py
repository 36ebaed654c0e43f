"""Records to token ids and a loss mask, through a Hugging Face tokenizer."""

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
    """Token ids of a record, and which of them are to be predicted.

    Text and completions begin as they do when they are served (`serve.tokenizer.encode_text`) and end with the
    tokenizer's end-of-sequence token, which is learnt. A chat is what its template writes, by the code that serves;
    every answer is learnt (`answers.find_answers`), and so are the tokens that close it. A token that holds both the
    end of the generation prompt and the beginning of an answer is learnt.

    Args:
        record: What `formats.parse_record` returned.
        tokenizer: A transformers tokenizer; a chat needs its chat template.
        completion_only: False: every token is learnt.
        where: File and line, for messages.
        now: The date and time of a template that prints them: given it, the tokens depend on the record alone.
            None is the time of this call.

    Returns:
        (ids, learn), of equal length. learn[0] has no effect: nothing precedes the first token.

    Raises:
        DataError: the chat template is missing, refuses the messages or has no place for something in them; text with
            half a surrogate pair.
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
    except (TypeError, UnicodeError) as error:  # half a surrogate pair: JSON's "\ud800" alone
        raise DataError(f"{where}: the tokenizer refuses the text: {error}") from error
    return ids, learn if completion_only else [True] * len(ids)


def _completion(record: Completion, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Tokens of both parts together, unless a token straddles the boundary: then each part on its own."""
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
        raise ChatError("messages: the tokenizer does not tell where its tokens stand in the text (it is not fast)")
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    start, stop = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
    learn = np.zeros(len(start), bool)
    for answer in answers:
        learn |= answer.learns(start, stop)
    return list(encoded["input_ids"]), learn.tolist()


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    eos = tokenizer.eos_token_id
    return ids if eos is None or (ids and ids[-1] == eos) else [*ids, eos]
