"""Messages of a conversation in the one form that chat templates get: plain JSON, text joined, arguments parsed."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loquetier_jax.errors import short

# Names that a message's reasoning is passed under; the first is the one that templates read.
REASONING = ("reasoning_content", "thinking", "reasoning")
# What a model that reads text only would never see: keys of a message, and columns of training data.
MEDIA = ("image", "images", "audio", "audios", "video", "videos")


class ChatError(ValueError):
    """A conversation cannot be templated; callers give it their own type and say where it stood."""


def normalize_messages(messages: Sequence[Any], name: str = "messages") -> list[dict[str, Any]]:
    """Each of some messages as `normalize_message` returns it; errors name `name[i]`."""
    return [normalize_message(message, f"{name}[{i}]") for i, message in enumerate(messages)]


def normalize_message(message: Any, name: str) -> dict[str, Any]:
    """A copy of an OpenAI message as templates expect it.

    Keys whose value is None and empty tool_calls are left out. A list of text parts becomes one string. Arguments of
    tool calls that are JSON text, as OpenAI writes them, become objects. Reasoning is there under the names that
    templates read.

    Args:
        message: A mapping with role and content; an assistant's may have tool_calls in place of content.
        name: What it is called, for messages.

    Raises:
        ChatError: a missing role or content, a part that is no text, arguments that are no object, `function_call`,
            images and the like, or a value that JSON does not have.
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
    """A copy made of JSON's own types alone: a template is code of somebody else's and gets no object with methods.

    Numpy scalars and arrays and tuples become what JSON has for them.

    Raises:
        ChatError: anything else, or a key that is no string.
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
    """Raises ChatError, naming the key behind `where`, if `data` has images, audio or videos; empty lists are none."""
    for key in MEDIA:
        value = data.get(key)
        if value is not None and not (isinstance(value, (list, tuple, str)) and not value):
            raise ChatError(f"{where}{key}: got {short(value)}, expected none: the model reads text only")
