"""Loads the tokenizer of a local model folder, and encodes text, chats and other prompts."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from loquetier_jax.errors import ModelError, RequestError, short
from loquetier_jax.serve.chat_template import ChatTemplate
from loquetier_jax.serve.messages import ChatError, normalize_messages
from loquetier_jax.serve.tokenizer_type import PreTrainedTokenizerBase
from loquetier_jax.token_ids import are_token_ids, listed

Prompt = str | Sequence[int] | np.ndarray | Sequence[Mapping[str, Any]]
"""Text, token ids, or the messages of a chat."""


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a local HF folder, without network access.

    Raises:
        ModelError: the folder does not exist, or has no tokenizer that transformers can load.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(f"tokenizer: got {str(path)!r}, expected a local folder with tokenizer.json")
    try:
        if _is_generic(folder):
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        from transformers import AutoTokenizer  # late: several seconds where torch is installed, which it imports

        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"tokenizer: cannot be loaded from {str(path)!r}: {error}") from error


def _is_generic(folder: Path) -> bool:
    """Whether a Llama's folder names the class that takes everything from tokenizer.json, as transformers 5 writes it.

    AutoTokenizer would then choose that class, too. It has exceptions, but none among Llamas.
    """
    files = [folder / name for name in ("tokenizer_config.json", "config.json", "tokenizer.json")]
    if not all(file.is_file() for file in files):
        return False
    tokenizer, model = (json.loads(file.read_text(encoding="utf-8")) for file in files[:2])
    generic = tokenizer.get("tokenizer_class") == "TokenizersBackend" and "auto_map" not in tokenizer
    return generic and model.get("model_type") == "llama"


def end_token_ids(
    tokenizer: PreTrainedTokenizerBase | None, model_ids: Sequence[int], vocab_size: int
) -> frozenset[int]:
    """End-of-sequence ids: those in the model's configs and the tokenizer's, which training appends.

    Args:
        tokenizer: May be None.
        model_ids: The ids in config.json and generation_config.json.
        vocab_size: V; ids outside the vocabulary are dropped.
    """
    own = None if tokenizer is None else tokenizer.eos_token_id
    ids = {*model_ids} if own is None else {*model_ids, own}
    return frozenset(i for i in ids if i < vocab_size)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of plain text, prefixed once with the tokenizer's BOS, if any.

    Text that already starts with it, such as the output of a chat template, gets no second one. An EOS added by the
    tokenizer is omitted: prompts continue, and training adds its own.

    Raises:
        TypeError, UnicodeError: a lone surrogate.
    """
    begin, ids = _begin(tokenizer), list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return ids if begin and ids[: len(begin)] == begin else begin + ids


def _begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special ids that a tokenizer puts before any text."""
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
    """The token ids of a prompt.

    Text is encoded by `encode_text`, ids are used as they are, and chats are rendered by the template.

    Args:
        tokenizer: May be None for token ids.
        prompt: See `Prompt`.
        vocab_size: If given, ids must be below it.
        tools, chat_template_kwargs, now: See `encode_chat`; only for chats.

    Raises:
        RequestError: an empty prompt, a wrong type, an id outside the vocabulary, text without a tokenizer, a chat
            that the template refuses, or template arguments for a prompt that is not a chat.
    """
    prompt = listed(prompt)
    is_list = isinstance(prompt, Sequence) and not isinstance(prompt, (str, bytes, bytearray))
    is_chat = is_list and bool(prompt) and all(isinstance(m, Mapping) for m in prompt)
    for name, value in (("tools", tools), ("chat_template_kwargs", chat_template_kwargs)):
        if value is not None and not is_chat:
            expected = f"chat messages as the prompt, not {short(prompt, 80)}"
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
    except (TypeError, UnicodeError) as error:  # a lone surrogate, which JSON's "\ud800" may produce
        raise RequestError(f"prompt: got {short(prompt, 200)}, expected text without lone surrogates") from error


def encode_chat(
    tokenizer: PreTrainedTokenizerBase | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    now: datetime | None = None,
) -> list[int]:
    """The token ids of a chat, followed by the opening of the assistant's turn.

    Training renders conversations with the same code (`train.tokenize`).

    Args:
        tokenizer: Must have a chat template.
        messages: OpenAI messages; content is a string or a list of text parts, see `messages.normalize_message`.
        tools: JSON schemas of the functions that may be called.
        chat_template_kwargs: Extra template variables, e.g. {"enable_thinking": False}.
        now: Date and time for templates that print them; None means now.

    Raises:
        RequestError: no tokenizer, no template, messages that the template refuses or drops, or an argument that it
            does not use.
    """
    try:
        template = ChatTemplate(tokenizer, tools=tools, chat_template_kwargs=chat_template_kwargs, now=now)
        text = template.render(normalize_messages(messages), generation_prompt=True)
        # The template adds the special tokens itself.
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    except ChatError as error:
        raise RequestError(str(error)) from error
    except (TypeError, UnicodeError) as error:
        raise RequestError("messages: expected text without lone surrogates") from error
