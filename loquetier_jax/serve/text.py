"""Incremental detokenization, and stop strings."""

from collections.abc import Callable, Sequence

from loquetier_jax.serve.tokenizer_type import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"  # decoded from bytes that do not (yet) form a character
PROMPT_CONTEXT = 6  # prompt tokens decoded as context, which decides the space before the first output token


def _decode_function(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # four times faster than the wrapper, and called twice per token
        return lambda ids: backend.decode(ids, skip_special_tokens=False)
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids skipped by `decode(skip_special_tokens=True)`; `all_special_ids` has only those with a role."""
    added = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset((*tokenizer.all_special_ids, *added))


class Detokenizer:
    """Text of one growing token sequence; returned text never changes.

    Decodes a short window: a few tokens of left context (which decide spaces) and the tokens not yet returned.
    Trailing replacement characters are held back because the next token may complete them; the text before them
    is final.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        """Starts after `prompt_ids`, whose text is not returned."""
        self._decode = _decode_function(tokenizer)
        self._skip = _special_ids(tokenizer) if skip_special_tokens else frozenset()
        tail = [t for t in prompt_ids[-4 * PROMPT_CONTEXT :] if t not in self._skip]
        self._start(tail[-PROMPT_CONTEXT:])

    def _start(self, context: list[int]) -> None:
        self._window = context
        self._context = len(context)
        self._shown = len(self._decode(context)) if context else 0

    def push(self, token: int) -> str:
        """Returns the text made final by this token; may be empty."""
        if token in self._skip:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        final = text.rstrip(REPLACEMENT)
        new = final[self._shown :]
        self._shown = max(self._shown, len(final))
        if new and len(final) == len(text):  # everything is returned: these tokens become the context
            self._start(self._window[self._context :])
        return new

    def flush(self) -> str:
        """Returns the text held back, with replacement characters for incomplete characters."""
        rest = self._decode(self._window)[self._shown :] if self._window else ""
        self._shown += len(rest)
        return rest


class StopChecker:
    """Finds the first stop string in a growing text, holding back text that may become one."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stops)
        self._held = ""  # the unreleased end of the text, a proper prefix of some stop

    def push(self, text: str, may_stop: bool = True) -> tuple[str, str | None]:
        """Appends text.

        Args:
            text: The new text.
            may_stop: False until min_tokens is reached: a stop string that ends in this text is then ordinary text.

        Returns:
            (text that can be released, the stop string found or None). The stop that ends first counts, and the
            longer of two that end together. Neither it nor the text after it is released, and nothing may be
            pushed afterwards.
        """
        if not self._stops:
            return text, None
        buffer, self._held = self._held + text, ""
        if may_stop and (found := self._first_stop(buffer, len(buffer) - len(text))):
            return found[0], found[1]
        keep = self._prefix_length(buffer)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep], None

    def _first_stop(self, buffer: str, old: int) -> tuple[str, str] | None:
        """(text before the stop, stop) for the stop with the earliest end past `old` characters, or None."""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = buffer.find(stop, max(0, old - len(stop) + 1))
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        return (buffer[: best[1]], best[2]) if best else None

    def _prefix_length(self, buffer: str) -> int:
        longest = max(len(s) for s in self._stops) - 1
        for length in range(min(longest, len(buffer)), 0, -1):
            tail = buffer[len(buffer) - length :]
            if any(len(s) > length and s.startswith(tail) for s in self._stops):
                return length
        return 0

    def flush(self) -> str:
        """Returns the held text, when the output has ended without it becoming a stop string."""
        rest, self._held = self._held, ""
        return rest
