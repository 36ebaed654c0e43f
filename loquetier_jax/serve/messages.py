"""Normalises chat messages for templates: plain JSON, text parts joined, tool arguments parsed."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loquetier_jax.errors import short

# Keys under which a message may carry its reasoning; templates read the first.
REASONING = ("reasoning_content", "thinking", "reasoning")
# Message keys, or columns of training data, that a text-only model would ignore.
MEDIA = ("image", "images", "audio", "audios", "video", "videos")


class ChatError(ValueError):
    """A conversation cannot be rendered; callers convert it to their own error type and add the location."""


def normalize_messages(messages: Sequence[Any], name: str = "messages") -> list[dict[str, Any]]:
    """Applies `normalize_message` to each message; errors name `name[i]`."""
    return [normalize_message(message, f"{name}[{i}]") for i, message in enumerate(messages)]


def normalize_message(message: Any, name: str) -> dict[str, Any]:
    """A copy of an OpenAI message in the form that templates expect.

    Keys with value None and empty tool_calls are dropped. A list of text parts becomes one string. Tool call arguments
    given as JSON text, as OpenAI writes them, become objects. Reasoning is stored under the keys that templates read.

    Args:
        message: A mapping with role and content; an assistant's may have tool_calls instead of content.
        name: Its location, for error messages.

    Raises:
        ChatError: a missing role or content, a non-text part, arguments that are not an object, `function_call`,
            images or other media, or a value that JSON cannot represent.
    """
    if not isinstance(message, Mapping):
        raise ChatError(f"{name}: got {short(message)}, expected an object with role and content")
    refuse_media(message, f"{name}.")
    plain = {k: v for k, v in plain_json(message, name).items() if v is not None and (k, v) != ("tool_calls", [])}
    if "function_call" in plain:
        raise ChatError(f"{name}.function_call: not supported, expected tool_calls")
    if "tool_calls" in plain:
        plain["tool_calls"] = _tool_calls(plain["tool_calls"], f"{name}.tool_calls")
    if "role" not in plain or ("content" not in plain and not plain.get("tool_calls")):
        raise ChatError(f"{name}: got keys {short(sorted(plain), 200)}, expected role and content")
    if not isinstance(plain["role"], str):
        raise ChatError(f"{name}.role: got {short(plain['role'])}, expected a string")
    if "content" in plain:
        plain["content"] = _content(plain["content"], f"{name}.content")
    reasoning = next((plain[key] for key in REASONING if key in plain), None)
    if reasoning is not None and not isinstance(reasoning, str):
        raise ChatError(f"{name}.{REASONING[0]}: got {short(reasoning)}, expected a string")
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _content(content: Any, name: str) -> str:
    """A string, or OpenAI's list of text parts joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ChatError(f"{name}: got {short(content)}, expected a string or a list of text parts")
    for i, part in enumerate(content):
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise ChatError(
                f"{name}[{i}]: got {short(part)}, expected {{'type': 'text', 'text': ...}}: the model reads text only"
            )
    return "".join(part["text"] for part in content)


def _tool_calls(calls: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise ChatError(f"{name}: got {short(calls)}, expected a list of calls")
    return [_tool_call(call, f"{name}[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: Any, name: str) -> dict[str, Any]:
    """OpenAI's {"id", "type", "function": {"name", "arguments"}}, or a bare {"name", "arguments"}."""
    if not isinstance(call, dict):
        raise ChatError(f"{name}: got {short(call)}, expected an object with a function's name and arguments")
    nested = "function" in call
    function = call["function"] if nested else call
    name = f"{name}.function" if nested else name
    if not (isinstance(function, dict) and isinstance(function.get("name"), str)):
        raise ChatError(f"{name}: got {short(function)}, expected an object with a function's name and arguments")
    function = {**function, "arguments": _arguments(function.get("arguments"), f"{name}.arguments")}
    return {**call, "function": function} if nested else function


def _arguments(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ChatError(f"{name}: got {short(value)}, expected a JSON object: {error}") from error
    elif value is None or isinstance(value, str):
        value = {}
    if not isinstance(value, dict):
        raise ChatError(f"{name}: got {short(value)}, expected a JSON object")
    return value


def plain_json(value: Any, name: str) -> Any:
    """A copy made only of plain JSON types, because a template is third-party code and must not get other objects.

    Numpy scalars, arrays and tuples are converted.

    Raises:
        ChatError: another type, or a key that is not a string.
    """
    try:
        return _plain(value, name)
    except RecursionError:
        raise ChatError(f"{name}: nested too deep") from None


def _plain(value: Any, name: str) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, np.generic):
        value = value.item()
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise ChatError(f"{name}: got key {short(odd[0])}, expected strings")
        return {str(key): _plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist(), name)
    raise ChatError(f"{name}: got {short(value)} ({type(value).__name__}), expected what JSON can hold")


def refuse_media(data: Mapping[str, Any], where: str) -> None:
    """Raises ChatError, with `where` and the key, if `data` has non-empty images, audio or videos."""
    for key in MEDIA:
        value = data.get(key)
        if value is not None and not (isinstance(value, (list, tuple, str)) and not value):
            raise ChatError(f"{where}{key}: got {short(value)}, expected none: the model reads text only")
