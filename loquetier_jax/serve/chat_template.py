"""Renders conversations with the tokenizer's chat template; shared by serving and training."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes

from loquetier_jax.errors import short
from loquetier_jax.serve.messages import REASONING, ChatError, plain_json
from loquetier_jax.serve.tokenizer_type import PreTrainedTokenizerBase

Message = dict[str, Any]
# Variables set by other arguments, or internally; not allowed in chat_template_kwargs.
_RESERVED = ("messages", "tools", "add_generation_prompt", "strftime_now", "raise_exception")

# Renders of a template share its environment, where some versions of transformers store the marks of one render.
_rendering = threading.Lock()


@dataclass(frozen=True)
class _Source:
    """The variables that a template's source refers to, and the keys it may look up."""

    variables: frozenset[str]
    keys: frozenset[str]


class ChatTemplate:
    """A tokenizer's chat template with all of its inputs bound except the messages."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ) -> None:
        """Checks the arguments against the template.

        Args:
            tokenizer: Must have a chat template.
            tools: JSON schemas of the functions that may be called.
            chat_template_kwargs: Extra template variables, e.g. {"enable_thinking": False}.
            now: Date and time for templates that print them; None means now.

        Raises:
            ChatError: no tokenizer, no template, an invalid template, or an argument that it does not use.
        """
        if tokenizer is None or not tokenizer.chat_template:
            raise ChatError("messages: got a chat, expected a prompt: the model folder has no chat template")
        self._tools = _tools(tools)
        kwargs = _kwargs(chat_template_kwargs)
        self._now = datetime.now() if now is None else now
        try:
            source = tokenizer.get_chat_template(tools=self._tools)  # a folder may hold several, one for tools
            self._template = _compiled(source)
            self._source = _read(source)
        except (jinja2.TemplateError, ValueError, RecursionError) as error:
            raise ChatError(f"the chat template cannot be read: {error}") from error
        variables = self._source.variables
        if self._tools and "tools" not in variables:
            raise ChatError(f"tools: got {len(self._tools)}, expected none: the chat template has no place for tools")
        for key in kwargs:
            if key not in variables:
                raise ChatError(f"chat_template_kwargs: got {short(key)}, expected what the chat template uses")
        self._variables = {"documents": None, **tokenizer.special_tokens_map, **kwargs}

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False, whole: bool = True) -> str:
        """Renders messages as transformers' `apply_chat_template` does.

        Args:
            messages: As `normalize_messages` returns them.
            generation_prompt: Whether to append the opening of the assistant's turn.
            whole: Whether to check that no content is dropped; False for parts or variants of a conversation that has
                already been checked.

        Raises:
            ChatError: the template refuses the messages, or drops part of one.
        """
        text = self._render(messages, generation_prompt, [])
        if whole:
            self._refuse_dropped(messages, text, generation_prompt)
        return text

    def render_marked(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """(text, character ranges [(start, stop)] of the template's `{% generation %}` blocks)."""
        marks: list[tuple[int, int]] = []
        text = self._render(messages, False, marks)
        self._refuse_dropped(messages, text, False)
        return text, marks

    def _render(self, messages: Sequence[Message], generation_prompt: bool, marks: list[tuple[int, int]]) -> str:
        blocks: list[str] = []  # the tracker measures the text so far from it
        try:
            with _rendering, self._template.environment.activate_tracker(blocks, marks):
                for block in self._template.generate(
                    **self._variables,
                    messages=list(messages),
                    tools=self._tools,
                    add_generation_prompt=generation_prompt,
                    strftime_now=self._now.strftime,
                ):
                    blocks.append(block)
        except Exception as error:  # a template is third-party code and may raise anything
            raise ChatError(f"messages: refused by the chat template: {error}") from error
        return "".join(blocks)

    def _refuse_dropped(self, messages: Sequence[Message], text: str, generation_prompt: bool) -> None:
        """Refuses messages whose tool calls, reasoning or content the template would silently drop."""
        self._refuse_dropped_content(messages, text, generation_prompt)
        for key, aliases in (("tool_calls", ("tool_calls",)), ("reasoning_content", REASONING)):
            if not self._source.keys.isdisjoint(aliases):
                continue
            for i, message in enumerate(messages):
                if not message.get(key):
                    continue
                without = {"content": "", **{k: v for k, v in message.items() if k not in aliases}}
                if self._render([*messages[:i], without, *messages[i + 1 :]], generation_prompt, []) == text:
                    raise ChatError(f"messages[{i}].{key}: the chat template has no place for it")

    def _refuse_dropped_content(self, messages: Sequence[Message], text: str, generation_prompt: bool) -> None:
        contents = [message.get("content", "").strip() for message in messages]
        unseen = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in text)
        for i, content in enumerate(contents):
            if not content or text.count(content) >= contents.count(content):
                continue
            changed = [*messages[:i], {**messages[i], "content": unseen}, *messages[i + 1 :]]
            try:
                same = self._render(changed, generation_prompt, []) == text
            except ChatError:  # the template depends on the content, so it does not drop it
                continue
            if same:
                beside = " beside tool_calls" if messages[i].get("tool_calls") else ""
                role = messages[i]["role"]
                raise ChatError(f"messages[{i}].content: the chat template drops it (role {role!r}{beside})")


def _compiled(source: str) -> jinja2.Template:
    from transformers.utils import chat_template_utils  # late, as all of transformers

    # Private, but it is what apply_chat_template uses, sandbox included; apply_chat_template itself takes no clock.
    return chat_template_utils._compile_jinja_template(source)


@lru_cache(maxsize=64)
def _read(source: str) -> _Source:
    tree = _compiled(source).environment.parse(source)
    variables = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"}
    keys = {node.attr for node in tree.find_all(nodes.Getattr)}
    keys |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return _Source(frozenset(variables), frozenset(keys))


def _tools(tools: Any) -> list[Any] | None:
    if tools is None:
        return None
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ChatError(f"tools: got {short(tools)}, expected a list of JSON schemas")
    return plain_json(tools, "tools") or None


def _kwargs(kwargs: Any) -> dict[str, Any]:
    if kwargs is None:
        return {}
    if not isinstance(kwargs, Mapping):
        raise ChatError(f"chat_template_kwargs: got {short(kwargs)}, expected an object of template variables")
    for key in kwargs:
        if key in _RESERVED:
            raise ChatError(f"chat_template_kwargs: got {short(key)}, which cannot be set here")
    return plain_json(kwargs, "chat_template_kwargs")
