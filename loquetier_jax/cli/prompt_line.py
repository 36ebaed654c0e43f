"""Extracts the prompt of a file's line: text, token ids or a chat. Imports no jax."""

from typing import Any

from loquetier_jax.config import is_int
from loquetier_jax.errors import LoquetierError


def prompt_of(data: dict[str, Any], where: str, error: type[LoquetierError]) -> Any:
    """The "prompt" or "messages" of a line; None if it has neither.

    Args:
        data: The decoded line.
        where: File and line, the prefix of error messages.
        error: Type of the exceptions raised.

    Raises:
        LoquetierError: of type `error`: both keys, an invalid prompt, or messages that are not a chat (otherwise a
            list of ids under "messages" would be accepted as a prompt).
    """
    if "prompt" in data and "messages" in data:
        raise error(f"{where}: got prompt and messages, expected only one of the two")
    if "messages" in data:
        messages = data["messages"]
        if not _list_of(messages, _is_message):
            raise error(f"{where}: messages: got {messages!r:.80}, expected a list of objects with role and content")
        return messages
    prompt = data.get("prompt")
    known = isinstance(prompt, str) or _list_of(prompt, is_int) or _list_of(prompt, _is_message)
    if "prompt" in data and not known:
        raise error(f"{where}: prompt: got {prompt!r:.80}, expected text, token ids or chat messages")
    return prompt


def _list_of(value: Any, ok: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(ok, value))


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and "role" in value and not value.keys().isdisjoint(("content", "tool_calls"))
