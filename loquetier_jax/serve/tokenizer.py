"""The tokenizer of a local model folder; text, chats and prompts of every kind to token ids."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from loquetier_jax.errors import ModelError, RequestError, short
from loquetier_jax.serve.chat_template import ChatTemplate
from loquetier_jax.serve.messages import ChatError, normalize_messages
from loquetier_jax.token_ids import are_token_ids, listed

Prompt = str | Sequence[int] | np.ndarray | Sequence[Mapping[str, Any]]
"""Text, token ids, or the messages of a chat."""


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a local HF folder; never asks a network.

    Raises:
        ModelError: there is no such folder, or no tokenizer in it that transformers can load.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(f"tokenizer: got {str(path)!r}, expected a local folder with tokenizer.json")
    from transformers import AutoTokenizer  # here, because importing it imports torch where that is installed

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"tokenizer: cannot be loaded from {str(path)!r}: {error}") from error


def end_token_ids(
    tokenizer: PreTrainedTokenizerBase | None, model_ids: Sequence[int], vocab_size: int
) -> frozenset[int]:
    """Ids that end a sequence: those of the model's configs, and the tokenizer's, which training appends.

    Args:
        tokenizer: May be None.
        model_ids: Those of config.json and generation_config.json.
        vocab_size: Ids from here on are no token of the model and left out.
    """
    own = None if tokenizer is None else tokenizer.eos_token_id
    ids = {*model_ids} if own is None else {*model_ids, own}
    return frozenset(i for i in ids if i < vocab_size)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of plain text, with what its tokenizer puts in front (BOS) once.

    Text that begins with it already, as the output of a chat template does, gets no second one. What some
    tokenizers put behind (EOS) is left off: a prompt goes on, and training adds its own end.

    Raises:
        TypeError, UnicodeError: half a surrogate pair.
    """
    begin, ids = _begin(tokenizer), list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return ids if begin and ids[: len(begin)] == begin else begin + ids


def _begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that a tokenizer puts in front of any text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    count = encoded["special_tokens_mask"].index(0)
    return list(encoded["input_ids"][:count])


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    vocab_size: int | None = None,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    now: datetime | None = None,
) -> tuple[int, ...]:
    """Returns the token ids of a prompt.

    Text gets the special tokens of its tokenizer (`encode_text`), ids stay as they are, chats go through the template.

    Args:
        tokenizer: May be None when only ids are given.
        prompt: See `Prompt`.
        vocab_size: Ids must be below this when it is given.
        tools: See `encode_chat`; for chats alone, as are the next two.
        chat_template_kwargs: See there.
        now: See there.

    Raises:
        RequestError: an empty prompt, a wrong type, an id outside the vocabulary, text without a tokenizer, a chat
            that its template refuses, or arguments of a template beside a prompt that is no chat.
    """
    prompt = listed(prompt)
    is_list = isinstance(prompt, Sequence) and not isinstance(prompt, (str, bytes, bytearray))  # bytes are no ids
    is_chat = is_list and bool(prompt) and all(isinstance(m, Mapping) for m in prompt)
    for name, value in (("tools", tools), ("chat_template_kwargs", chat_template_kwargs)):
        if value is not None and not is_chat:
            expected = f"it beside chat messages, not {short(prompt, 80)}"
            raise RequestError(f"{name}: got {short(value, 200)}, expected {expected}")
    if isinstance(prompt, str):
        ids = _encode_text(tokenizer, prompt)
    elif is_chat:
        ids = encode_chat(tokenizer, prompt, tools=tools, chat_template_kwargs=chat_template_kwargs, now=now)
    elif are_token_ids(prompt):
        ids = list(prompt)
    else:
        raise RequestError(f"prompt: got {short(prompt, 200)}, expected text, token ids or chat messages")
    if not ids:
        raise RequestError(f"prompt: got {short(prompt)}, expected at least one token")
    bad = next((i for i in ids if i < 0 or (vocab_size is not None and i >= vocab_size)), None)
    if bad is not None:
        raise RequestError(f"prompt: got token id {short(bad)}, expected ids in [0, {vocab_size or 'vocab_size'})")
    return tuple(ids)


def _encode_text(tokenizer: PreTrainedTokenizerBase | None, prompt: str) -> list[int]:
    if tokenizer is None:
        raise RequestError("prompt: got text, expected token ids: this engine has no tokenizer")
    try:
        return encode_text(tokenizer, prompt)
    except (TypeError, UnicodeError) as error:  # half a surrogate pair, as JSON's "\ud800" may bring
        raise RequestError(f"prompt: got {short(prompt, 200)}, expected text of whole characters") from error


def encode_chat(
    tokenizer: PreTrainedTokenizerBase | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    now: datetime | None = None,
) -> list[int]:
    """Returns the token ids of a chat with the opening of the assistant's turn appended.

    Training renders a conversation by the same code (`train.tokenize`).

    Args:
        tokenizer: Must have a chat template.
        messages: OpenAI messages; content is a string or a list of text parts, see `messages.normalize_message`.
        tools: JSON schemas of the functions that may be called.
        chat_template_kwargs: Further variables of the template, e.g. {"enable_thinking": False}.
        now: The date and time of a template that prints them; None is the time of this call.

    Raises:
        RequestError: no tokenizer, no template, messages that the template refuses or has no place for, or an
            argument that it does not use.
    """
    try:
        template = ChatTemplate(tokenizer, tools=tools, chat_template_kwargs=chat_template_kwargs, now=now)
        text = template.render(normalize_messages(messages), generation_prompt=True)
        # the template writes the special tokens itself
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    except ChatError as error:
        raise RequestError(str(error)) from error
    except (TypeError, UnicodeError) as error:
        raise RequestError("messages: expected text of whole characters") from error
