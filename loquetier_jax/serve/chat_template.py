"""A conversation to text by the tokenizer's chat template: the one way there is, for serving and for training."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from loquetier_jax.errors import short
from loquetier_jax.serve.messages import REASONING, ChatError, plain_json

Message = dict[str, Any]
# What a render is given by other arguments, or by nobody.
_RESERVED = ("messages", "tools", "add_generation_prompt", "strftime_now", "raise_exception")

# Renders of a template share its environment, and some versions of transformers keep the marks of one there.
_rendering = threading.Lock()


@dataclass(frozen=True)
class _Source:
    """What the text of a template tells: the variables it asks for, and the keys it may look up."""

    variables: frozenset[str]
    keys: frozenset[str]


class ChatTemplate:
    """A tokenizer's chat template with everything but the messages: what it renders depends on those alone."""

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
            chat_template_kwargs: Further variables of the template, e.g. {"enable_thinking": False}.
            now: The date and time of a template that prints them; None is the time of this call.

        Raises:
            ChatError: no tokenizer, no template, one that is no Jinja, or an argument that it has no place for.
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
        """The text of some messages, as transformers' `apply_chat_template` renders it.

        Args:
            messages: As `normalize_messages` returns them.
            generation_prompt: Whether to open the assistant's turn behind them.
            whole: False: a part or a variant of a conversation that has been rendered, and may lack what that shows.

        Raises:
            ChatError: the template refuses them, or has no place for what one of them holds.
        """
        text = self._render(messages, generation_prompt, [])
        if whole:
            self._refuse_dropped(messages, text, generation_prompt)
        return text

    def render_marked(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """(text, [(start, stop)] of what stands in the template's own `{% generation %}` blocks, in characters)."""
        marks: list[tuple[int, int]] = []
        text = self._render(messages, False, marks)
        self._refuse_dropped(messages, text, False)
        return text, marks

    def _render(self, messages: Sequence[Message], generation_prompt: bool, marks: list[tuple[int, int]]) -> str:
        blocks: list[str] = []  # the tracker reads from it how long the text is so far
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
        except Exception as error:  # a template is code of the model's author: it raises what it likes
            raise ChatError(f"messages: refused by the chat template: {error}") from error
        return "".join(blocks)

    def _refuse_dropped(self, messages: Sequence[Message], text: str, generation_prompt: bool) -> None:
        """Calls, reasoning and content that a template has no place for would vanish without a word."""
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
            except ChatError:  # it looks at the content, or it would not mind another one
                continue
            if same:
                beside = " beside tool_calls" if messages[i].get("tool_calls") else ""
                role = messages[i]["role"]
                raise ChatError(f"messages[{i}].content: the chat template drops it (role {role!r}{beside})")


def _compiled(source: str) -> jinja2.Template:
    # Private, but what apply_chat_template itself renders with, sandbox included: that one takes no clock.
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
            raise ChatError(f"chat_template_kwargs: got {short(key)}, which is not among what can be set here")
    return plain_json(kwargs, "chat_template_kwargs")
