"""Common record formats: chat messages, prompt + completion, Alpaca, GSM8K, ShareGPT, plain text."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from loquetier_jax.errors import DataError, short
from loquetier_jax.serve.messages import MEDIA, REASONING, ChatError, normalize_message, plain_json, refuse_media
from loquetier_jax.token_ids import listed

# The two templates of github.com/tatsu-lab/stanford_alpaca, used by all Alpaca-trained models.
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
GSM8K = "Question: {question}\nAnswer: "
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
}
# Columns of conversations; in other formats they are refused rather than dropped.
CHAT_COLUMNS = ("system", "history", "tools", "chat_template_kwargs")
FORMATS = "messages | prompt + completion | instruction + output | question + answer | conversations | text"


@dataclass(frozen=True)
class Text:
    """Plain text; every token has loss."""

    text: str


@dataclass(frozen=True)
class Completion:
    """A prompt and its completion, both plain text."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """A conversation for the tokenizer's chat template.

    Attributes:
        messages: As returned by `serve.messages.normalize_message`.
        train: Whether message i has loss: non-empty assistant messages not excluded by "weight": 0 or "train": false.
        tools: Tool definitions for the template, or None.
        chat_template_kwargs: Extra template variables, or None.
        num_empty: Assistant messages that have no loss only because they are empty.
    """

    messages: tuple[dict[str, Any], ...]
    train: tuple[bool, ...]
    tools: tuple[Any, ...] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    num_empty: int = field(default=0, repr=False)


Record = Text | Completion | Chat


def parse_record(data: Any, where: str) -> Record:
    """Parses one record, whose format is recognised by its keys.

    Columns of conversations (CHAT_COLUMNS) are used or refused; other unknown columns are ignored.

    Args:
        data: A decoded JSON object. If it fits several formats, the first of FORMATS wins (Alpaca files often have a
            redundant `text`).
        where: File and line, for error messages.

    Raises:
        DataError: an unknown format, a missing half of a pair, a value of the wrong type, or a column that the format
            does not support.
    """
    if not isinstance(data, dict):
        raise DataError(f"{where}: got {type(data).__name__}, expected a JSON object")
    data = {key: listed(value) for key, value in data.items()}
    refuse_columns(data, where)
    if "messages" in data:
        return _conversation(_chat(data["messages"], where), data, where)
    if "prompt" in data or "completion" in data:
        return _pair(data, where)
    if "instruction" in data or "output" in data:
        fields = {k: _string(data, k, where) for k in ("instruction", "output")}
        context = _string(data, "input", where) if data.get("input") is not None else ""
        template = ALPACA_INPUT if context else ALPACA
        prompt = template.format(instruction=fields["instruction"], input=context)
        return _completion(prompt, fields["output"], data, where)
    if "question" in data or "answer" in data:
        prompt = GSM8K.format(question=_string(data, "question", where))
        return _completion(prompt, _string(data, "answer", where), data, where)
    if "conversations" in data:
        return _conversation(_sharegpt(data["conversations"], where), data, where)
    if "text" in data:
        refuse_chat_columns(data, where)
        return Text(_string(data, "text", where))
    raise DataError(f"{where}: got keys {short(list(data), 200)}, expected {FORMATS}")


def refuse_columns(data: Mapping[str, Any], where: str) -> None:
    """Raises DataError, naming the column, if there is one that no format supports."""
    try:
        refuse_media(data, f"{where}: ")
    except ChatError as error:
        raise DataError(str(error)) from error
    for key in ("train", "weight"):
        if data.get(key) is not None:
            expected = "it on an assistant message: leave out a record that is not to be learnt"
            raise DataError(f"{where}: {key}: got {short(data[key])} for the whole record, expected {expected}")


def _pair(data: dict[str, Any], where: str) -> Record:
    for key in ("prompt", "completion"):
        if key not in data:
            raise DataError(f"{where}: {key} is missing")
    prompt, completion = data["prompt"], data["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        # Messages in the prompt have no loss, whatever their role.
        context, learnt = _chat(prompt, where, "prompt"), _chat(completion, where, "completion")
        train = (False,) * len(context.messages) + learnt.train
        return _conversation(Chat(context.messages + learnt.messages, train, num_empty=learnt.num_empty), data, where)
    if isinstance(prompt, str) and isinstance(completion, str):
        return _completion(prompt, _string(data, "completion", where), data, where)
    got = f"{type(prompt).__name__} and {type(completion).__name__}"
    raise DataError(
        f"{where}: prompt and completion: got {got}, expected two strings or two lists of messages"
    )


def refuse_chat_columns(data: Mapping[str, Any], where: str, beside: str = "plain text") -> None:
    """Raises DataError, naming the column, if one of CHAT_COLUMNS is used with a format that does not support it."""
    for key in CHAT_COLUMNS:
        if data.get(key):
            raise DataError(
                f"{where}: {key}: got {short(data[key])} beside {beside}, which has no place for it: "
                "write the conversation as messages"
            )


def _completion(prompt: str, completion: str, data: dict[str, Any], where: str) -> Completion:
    refuse_chat_columns(data, where)
    return Completion(prompt, completion)


def _conversation(chat: Chat, data: dict[str, Any], where: str) -> Chat:
    """Applies the other columns of a record to its conversation."""
    if data.get("history"):
        raise DataError(f"{where}: history: got {short(data['history'])}, expected it among the messages")
    if system := data.get("system"):
        if not isinstance(system, str):
            raise DataError(f"{where}: system: got {short(system)}, expected a string")
        if chat.messages[0]["role"] == "system":
            raise DataError(f"{where}: system: got {short(system)} and a system message, expected one of the two")
        first = {"role": "system", "content": system}
        chat = replace(chat, messages=(first, *chat.messages), train=(False, *chat.train))
    tools, kwargs = _tools(data.get("tools"), where), data.get("chat_template_kwargs")
    if not isinstance(kwargs, Mapping | None):
        raise DataError(f"{where}: chat_template_kwargs: got {short(kwargs)}, expected an object")
    try:
        kwargs = plain_json(kwargs, "chat_template_kwargs")
    except ChatError as error:
        raise DataError(f"{where}: {error}") from error
    return replace(chat, tools=tools, chat_template_kwargs=kwargs)


def _tools(tools: Any, where: str) -> tuple[Any, ...] | None:
    """Tools as a list, or as JSON text, since table columns must have one type."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: tools: got {short(tools)}, expected a list: {error}") from error
    if not tools:
        return None
    if not isinstance(tools, list):
        raise DataError(f"{where}: tools: got {short(tools)}, expected a list")
    try:
        return tuple(plain_json(tools, "tools"))
    except ChatError as error:
        raise DataError(f"{where}: {error}") from error


def _chat(messages: Any, where: str, name: str = "messages") -> Chat:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: {name}: got {short(messages)}, expected a non-empty list of messages")
    try:
        parsed = [_message(m, f"{name}[{i}]") for i, m in enumerate(messages)]
    except ChatError as error:
        raise DataError(f"{where}: {error}") from error
    says = [any(m.get(key) for key in ("content", "tool_calls", REASONING[0])) for m, _ in parsed]
    train = tuple(t and one for (_, t), one in zip(parsed, says, strict=True))
    if not any(train) and parsed[-1][1]:  # learn the end token of an empty answer
        train = (*train[:-1], True)
    return Chat(tuple(m for m, _ in parsed), train, num_empty=sum(t for _, t in parsed) - sum(train))


def _message(message: Any, name: str) -> tuple[dict[str, Any], bool]:
    """(message without its training flags, whether it has loss)."""
    plain = normalize_message(message, name)
    role = plain["role"]
    if role not in ROLES:
        raise ChatError(f"{name}.role: got {short(role)}, expected one of {ROLES}")
    weight, train = plain.pop("weight", None), plain.pop("train", None)
    if weight is not None and (weight not in (0, 1) or role != "assistant"):
        raise ChatError(f"{name}.weight: got {short(weight)}, expected 0 or 1, on an assistant message")
    if train is not None and (not isinstance(train, bool) or (train and role != "assistant")):
        raise ChatError(f"{name}.train: got {short(train)}, expected false, or true on an assistant message")
    if "train_detail" in plain:
        raise ChatError(f"{name}.train_detail: not supported, expected a message to be learnt as a whole (train)")
    return plain, role == "assistant" and weight != 0 and train is not False


def _sharegpt(turns: Any, where: str) -> Chat:
    if not isinstance(turns, list):
        raise DataError(f"{where}: conversations: got {short(turns)}, expected a list of turns")
    messages = []
    for i, turn in enumerate(turns):
        said = turn.get("from") if isinstance(turn, dict) else None
        role = SHAREGPT_ROLES.get(said) if isinstance(said, str) else None
        if role is None or not isinstance(turn.get("value"), str):
            expected = f"from (one of {tuple(SHAREGPT_ROLES)}) and value (a string)"
            raise DataError(f"{where}: conversations[{i}]: got {short(turn)}, expected {expected}")
        learnt = {key: turn[key] for key in ("weight", "train", "train_detail", *MEDIA) if key in turn}
        messages.append({"role": role, "content": turn["value"], **learnt})
    return _chat(messages, where, "conversations")


def _string(data: dict[str, Any], key: str, where: str) -> str:
    value = data.get(key)
    if not isinstance(value, str):
        raise DataError(f"{where}: {key}: got {short(value)}, expected a string")
    if not value and key != "input":
        raise DataError(f"{where}: {key}: got an empty string")
    return value
