"""Locates the answers in the text of a conversation, i.e. the characters that have loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int

from loquetier_jax.serve.chat_template import ChatTemplate, Message
from loquetier_jax.serve.messages import ChatError


@dataclass(frozen=True)
class Answer:
    """An assistant turn in a text, as character positions: content and calls up to `body`, its closing up to `stop`.

    A turn starts where the generation prompt used in serving ends.
    """

    start: int
    body: int
    stop: int

    def learns(self, start: Int[np.ndarray, " n"], stop: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Which tokens, given by their character ranges, have loss: those that touch the body or are in the closing."""
        body = (start < self.body) & (stop > self.start)
        return body | ((self.start <= start) & (start < self.stop) & (stop <= self.stop))


def find_answers(
    template: ChatTemplate, messages: Sequence[Message], learnt: Sequence[bool]
) -> tuple[str, list[Answer]]:
    """The text of a conversation and the positions of the answers to learn.

    If the template marks what the assistant generates (`{% generation %}`), the marks are the answers. Otherwise an
    answer starts where the rendering of the previous messages plus the generation prompt ends, and ends where the
    rendering up to and including it ends. For templates that render a turn differently once others follow it (Qwen3
    drops the thinking), these are not prefixes of the text; the answer is then where the text changes with the message.

    Args:
        template: With the tools and variables of this conversation.
        messages: Normalised messages.
        learnt: Whether to learn message i; may only be true for assistant messages.

    Raises:
        ChatError: the template refuses the messages, or drops one to be learnt.
    """
    finder = _Finder(template, list(messages))
    assistants = sum(message["role"] == "assistant" for message in messages)
    if len(finder.marks) == assistants == sum(learnt):
        return finder.text, [Answer(start, stop, stop) for start, stop in finder.marks]
    return finder.text, [answer for i, one in enumerate(learnt) if one for answer in finder.answers(i)]


class _Finder:
    """Finds the answers of one conversation by rendering parts and variants of it."""

    def __init__(self, template: ChatTemplate, messages: list[Message]) -> None:
        self._template, self._messages = template, messages
        self.text, self.marks = template.render_marked(messages)

    def answers(self, i: int) -> list[Answer]:
        """The answers of message i: its marked parts, or the whole turn if it has no marks."""
        if self.marks:
            start, stop = self._learnable(i)
            found = [Answer(a, b, b) for a, b in self.marks if a < max(stop, start + 1) and b > start]
            if found:
                return found
        start = self._start(i)
        body, stop = self._end(i)
        return [Answer(start, max(body, start), max(stop, start))]

    def _start(self, i: int) -> int:
        opened = self._part(i, generation_prompt=True)
        if opened is not None and self.text.startswith(opened):
            return len(opened)
        words = self._learnable(i)[0]
        before = self._part(i)
        if opened and before and all(text.startswith(before) for text in (opened, self.text)):
            return min(_shared(opened, self.text), words)  # the prompt opens a block (thinking) that this turn lacks
        # Not a continuation of the generation prompt: start after the turn's header, or at its content.
        previous = self._changed(i - 1) if i else (0, 0)
        found = self.text.rfind(self._header, previous[1], words) if previous and self._header else -1
        return words - len(self._lead(i, opened, words)) if found < 0 else found + len(self._header)

    def _part(self, count: int, generation_prompt: bool = False) -> str | None:
        """The rendering of the first messages; None if the template refuses, e.g. without a user message."""
        if not count:
            return None
        try:
            return self._template.render(self._messages[:count], generation_prompt=generation_prompt, whole=False)
        except ChatError:  # not an error: the whole conversation was rendered
            return None

    @cached_property
    def _header(self) -> str:
        """The generation prompt."""
        opened = self._template.render(self._messages, generation_prompt=True, whole=False)
        return opened[len(self.text) :] if opened.startswith(self.text) else ""

    def _lead(self, i: int, opened: str | None, words: int) -> str:
        """The text between the generation prompt and the answer's content (e.g. a space), if also in this text."""
        part = self._part(i + 1)
        if opened is None or part is None or not part.startswith(opened):
            return ""
        lead = part[len(opened) : _difference(part, self._variant(i, self._messages[: i + 1]))[0]]
        return lead if self.text[:words].endswith(lead) else ""

    def _end(self, i: int) -> tuple[int, int]:
        """(end of message i's content, end of its closing)."""
        if i + 1 == len(self._messages):
            return len(self.text), len(self.text)
        part = self._part(i + 1)
        if part is not None and self.text.startswith(part):
            return len(part), len(part)
        words = self._learnable(i)[1]
        return words, words + _shared(self.text[words:], self._closing(i, part))

    def _closing(self, i: int, part: str | None) -> str:
        """The text that closes message i when it is the last one; if that is refused, what closes the last answer."""
        if part is not None:
            return part[_difference(part, self._variant(i, self._messages[: i + 1]))[1] :]
        last = len(self._messages) - 1
        if self._messages[last]["role"] != "assistant":
            raise ChatError(f"messages[{i}]: the chat template does not show where it ends: split the conversation")
        return self.text[self._learnable(last)[1] :]

    def _learnable(self, i: int) -> tuple[int, int]:
        found = self._changed(i)
        if found is None:
            raise ChatError(
                f"messages[{i}]: the chat template leaves it out of the whole conversation, so it cannot be learnt: "
                "split the conversation here, or give it weight 0"
            )
        return found

    def _changed(self, i: int) -> tuple[int, int] | None:
        """The range of the text that changes when message i does; None if it does not appear in the text."""
        variant = self._variant(i, self._messages)
        return _difference(self.text, variant) if self._unseen in variant else None

    def _variant(self, i: int, messages: list[Message]) -> str:
        changed = [*messages[:i], _replaced(messages[i], self._unseen), *messages[i + 1 :]]
        return self._template.render(changed, whole=False)

    @cached_property
    def _unseen(self) -> str:
        """A character that does not occur in the text, so that changes are never hidden by coincidence."""
        return next(c for c in map(chr, range(0xE000, 0xF900)) if c not in self.text)


def _replaced(message: Message, word: str) -> Message:
    """A message of the same kind with all content replaced by `word`."""
    changed = {k: word if k in ("content", "reasoning_content", "thinking") else v for k, v in message.items()}
    if calls := message.get("tool_calls"):
        changed["tool_calls"] = [_replaced_call(call, word) for call in calls]
    return changed


def _replaced_call(call: Message, word: str) -> Message:
    if "function" in call:
        return {**call, "function": _replaced_call(call["function"], word)}
    return {**call, "name": word, "arguments": {word: word}}


def _difference(text: str, other: str) -> tuple[int, int]:
    """(start, stop) of `text` without its common prefix and suffix with `other`."""
    start = _shared(text, other)
    return start, len(text) - _shared(text[start:][::-1], other[start:][::-1])


def _shared(a: str, b: str) -> int:
    """Length of the common prefix of two texts."""
    same, most = 0, min(len(a), len(b))
    while same < most:  # bisection with fast string comparisons, because conversations are long
        middle = (same + most + 1) // 2
        if a[same:middle] == b[same:middle]:
            same = middle
        else:
            most = middle - 1
    return same
