"""Chat templates of real models, each on a byte tokenizer with its special tokens, and conversations of every kind."""

import importlib.metadata
from pathlib import Path
from typing import Any

from loquetier_jax.tiny.tokenizer import build_tokenizer

LLAMA = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
QWEN = (None, "<|im_end|>", "<|im_start|>", "<tool_call>", "</tool_call>", "<think>", "</think>")
GEMMA = ("<bos>", "<end_of_turn>", "<start_of_turn>")
MISTRAL = ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[TOOL_RESULTS]")
GPTOSS = (None, "<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>")
# Family -> begin and end token, and the others that its tokenizer knows.
TOKENS: dict[str, tuple[str | None, ...]] = {
    "llama3": LLAMA, "qwen": QWEN, "gemma": GEMMA, "mistral": MISTRAL, "gptoss": GPTOSS,
}  # fmt: skip


def template(name: str) -> str:
    """The text of a template that trl's wheel holds, found without importing trl; or of one beside this file."""
    own = Path(__file__).parent / "templates" / f"{name}.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    (found,) = (f for f in importlib.metadata.files("trl") or () if f.name == f"{name}.jinja")
    return Path(found.locate()).read_text(encoding="utf-8")


def chat_tokenizer(name: str) -> Any:
    """A tokenizer with that template: bytes, and the special tokens of the template's family."""
    begin, end, *others = next(tokens for family, tokens in TOKENS.items() if name.startswith(family))
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([t for t in (begin, end, *others) if t], special_tokens=True)
    tokenizer.bos_token, tokenizer.eos_token = begin, end
    tokenizer.chat_template = template(name)
    return tokenizer


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
SYSTEM = {"role": "system", "content": "Be brief."}
TWO_TURNS = [user("Hi"), assistant("Hello"), user("Bye"), assistant("Ciao")]
CHATS: dict[str, list[dict[str, Any]]] = {
    "single turn": [SYSTEM, user("Hi"), assistant("Hello")],
    "multi-turn": TWO_TURNS,
    "system": [SYSTEM, *TWO_TURNS],
    "no system": TWO_TURNS[:2],
    "assistant first": [assistant("Welcome"), *TWO_TURNS[:2]],
    "tools": [
        user("Weather?"),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": "sunny"},
        assistant("It is sunny."),
    ],
    "thinking": [
        user("Hi"),
        assistant("Hello", reasoning_content="A greeting."),
        user("Bye"),
        assistant("Ciao", reasoning_content="They leave."),
    ],
}


def tools_of(chat: str) -> list[dict[str, Any]] | None:
    """What the conversation may call."""
    return [WEATHER] if chat == "tools" else None
