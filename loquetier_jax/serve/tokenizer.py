"""The tokenizer of a local model folder, and prompts to token ids."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from loquetier_jax.errors import ModelError, RequestError

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
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


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase | None, prompt: Prompt, vocab_size: int | None = None
) -> tuple[int, ...]:
    """Returns the token ids of a prompt.

    Text gets the special tokens of its tokenizer (BOS), ids stay as they are, chats go through the template.

    Args:
        tokenizer: May be None when only ids are given.
        prompt: See `Prompt`.
        vocab_size: Ids must be below this when it is given.

    Raises:
        RequestError: an empty prompt, a wrong type, an id outside the vocabulary, text without a tokenizer.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise RequestError("prompt: got text, expected token ids: this engine has no tokenizer")
        try:
            ids = tokenizer.encode(prompt)
        except (TypeError, UnicodeError) as error:  # half a surrogate pair, as JSON's "\ud800" may bring
            raise RequestError(f"prompt: got {prompt!r:.200}, expected text of whole characters") from error
    elif _is_list(prompt) and prompt and all(isinstance(m, Mapping) for m in prompt):
        ids = encode_chat(tokenizer, prompt)
    elif _is_list(prompt) and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt):
        ids = prompt
    else:
        raise RequestError(f"prompt: got {prompt!r:.200}, expected text, token ids or chat messages")
    if not len(ids):
        raise RequestError(f"prompt: got {prompt!r}, expected at least one token")
    bad = next((i for i in ids if i < 0 or (vocab_size is not None and i >= vocab_size)), None)
    if bad is not None:
        raise RequestError(f"prompt: got token id {bad}, expected ids in [0, {vocab_size or 'vocab_size'})")
    return tuple(ids)


def _is_list(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray))  # bytes are no token ids


def encode_chat(
    tokenizer: PreTrainedTokenizerBase | None, messages: Sequence[Mapping[str, Any]], **template_kwargs: Any
) -> list[int]:
    """Returns the token ids of a chat with the opening of the assistant's turn appended.

    Args:
        tokenizer: Must have a chat template.
        messages: `{"role": ..., "content": ...}` mappings; content is a string or a list of text parts.
        **template_kwargs: Passed to the template, e.g. `tools`.

    Raises:
        RequestError: no tokenizer, no template, or messages that the template refuses.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise RequestError("messages: got a chat, expected a prompt: the model folder has no chat template")
    for i, message in enumerate(messages):
        for key in ("role", "content"):
            if key not in message:
                raise RequestError(f"messages[{i}]: got keys {sorted(message)}, expected role and content")
    try:
        return tokenizer.apply_chat_template(
            [dict(m) for m in messages], add_generation_prompt=True, return_dict=False, **template_kwargs
        )
    except Exception as error:  # a template is code of the model's author: it raises what it likes
        raise RequestError(f"messages: refused by the chat template: {error}") from error
