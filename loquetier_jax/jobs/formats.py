"""The record formats people have: chat messages, prompt + completion, Alpaca, GSM8K, ShareGPT, plain text."""

from dataclasses import dataclass
from typing import Any

from loquetier_jax.errors import DataError

# The two templates of github.com/tatsu-lab/stanford_alpaca, which every Alpaca-trained model has seen.
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
FORMATS = "messages | prompt + completion | instruction + output | question + answer | conversations | text"


@dataclass(frozen=True)
class Text:
    """Plain text; every token is learnt."""

    text: str


@dataclass(frozen=True)
class Completion:
    """A prompt and what follows it, both plain text."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """A conversation for the tokenizer's chat template.

    Attributes:
        messages: OpenAI messages; content is a string.
        train: Whether message i is learnt: assistant messages whose weight is not 0.
        tools: Tool definitions handed to the template, or None.
    """

    messages: tuple[dict[str, Any], ...]
    train: tuple[bool, ...]
    tools: tuple[Any, ...] | None = None


Record = Text | Completion | Chat


def parse_record(data: Any, where: str) -> Record:
    """Recognises the format of one record by its keys; other keys are ignored, as columns of a table are.

    Args:
        data: A decoded JSON object. When it fits several formats the first of FORMATS wins (Alpaca files
            often carry a redundant `text`).
        where: File and line, for messages.

    Raises:
        DataError: no known format, a missing half of a pair, or a value of the wrong type.
    """
    if not isinstance(data, dict):
        raise DataError(f"{where}: got {type(data).__name__}, expected a JSON object")
    if "messages" in data:
        return _chat(data["messages"], data.get("tools"), where)
    if "prompt" in data or "completion" in data:
        return _pair(data, where)
    if "instruction" in data or "output" in data:
        fields = {k: _string(data, k, where) for k in ("instruction", "output")}
        context = _string(data, "input", where) if data.get("input") is not None else ""
        template = ALPACA_INPUT if context else ALPACA
        return Completion(template.format(instruction=fields["instruction"], input=context), fields["output"])
    if "question" in data or "answer" in data:
        return Completion(
            GSM8K.format(question=_string(data, "question", where)), _string(data, "answer", where)
        )
    if "conversations" in data:
        return _sharegpt(data["conversations"], where)
    if "text" in data:
        return Text(_string(data, "text", where))
    raise DataError(f"{where}: got keys {sorted(map(str, data))}, expected {FORMATS}")


def _pair(data: dict[str, Any], where: str) -> Record:
    for key in ("prompt", "completion"):
        if key not in data:
            raise DataError(f"{where}: {key} is missing")
    prompt, completion = data["prompt"], data["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        # what stands in the prompt is given, not learnt, whoever said it
        context = _chat(prompt, data.get("tools"), where, "prompt")
        learnt = _chat(completion, None, where, "completion")
        train = (False,) * len(context.messages) + learnt.train
        return Chat(context.messages + learnt.messages, train, context.tools)
    if isinstance(prompt, str) and isinstance(completion, str):
        return Completion(prompt, _string(data, "completion", where))
    got = f"{type(prompt).__name__} and {type(completion).__name__}"
    raise DataError(
        f"{where}: prompt and completion: got {got}, expected two strings or two lists of messages"
    )


def _chat(messages: Any, tools: Any, where: str, name: str = "messages") -> Chat:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: {name}: got {_short(messages)}, expected a non-empty list of messages")
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"{where}: tools: got {_short(tools)}, expected a list")
    parsed = [_message(m, f"{where}: {name}[{i}]") for i, m in enumerate(messages)]
    return Chat(
        tuple(m for m, _ in parsed), tuple(t for _, t in parsed), None if tools is None else tuple(tools)
    )


def _message(message: Any, where: str) -> tuple[dict[str, Any], bool]:
    if not isinstance(message, dict):
        raise DataError(f"{where}: got {_short(message)}, expected an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise DataError(f"{where}.role: got {_short(role)}, expected one of {ROLES}")
    weight = message.get("weight", 1)
    if weight not in (0, 1) or ("weight" in message and role != "assistant"):
        raise DataError(f"{where}.weight: got {_short(weight)}, expected 0 or 1, on an assistant message")
    plain = {k: v for k, v in message.items() if k != "weight"}
    calls_a_tool = role == "assistant" and bool(message.get("tool_calls"))
    if not (calls_a_tool and message.get("content") is None):
        plain["content"] = _content(message.get("content"), f"{where}.content")
    return plain, role == "assistant" and weight == 1


def _content(content: Any, where: str) -> str:
    """A string, or OpenAI's list of text parts joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"{where}: got {_short(content)}, expected a string or a list of text parts")
    for i, part in enumerate(content):
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise DataError(f"{where}[{i}]: got {_short(part)}, expected {{'type': 'text', 'text': ...}}")
    return "".join(part["text"] for part in content)


def _sharegpt(turns: Any, where: str) -> Chat:
    if not isinstance(turns, list):
        raise DataError(f"{where}: conversations: got {_short(turns)}, expected a list of turns")
    messages = []
    for i, turn in enumerate(turns):
        role = SHAREGPT_ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        if role is None or not isinstance(turn.get("value"), str):
            expected = f"from (one of {tuple(SHAREGPT_ROLES)}) and value (a string)"
            raise DataError(f"{where}: conversations[{i}]: got {_short(turn)}, expected {expected}")
        messages.append({"role": role, "content": turn["value"]})
    return _chat(messages, None, where, "conversations")


def _string(data: dict[str, Any], key: str, where: str) -> str:
    value = data.get(key)
    if not isinstance(value, str):
        raise DataError(f"{where}: {key}: got {_short(value)}, expected a string")
    if not value and key != "input":
        raise DataError(f"{where}: {key}: got an empty string")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
