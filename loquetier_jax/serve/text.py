"""Tokens to text while they arrive: incremental detokenizer, and stop strings."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are not (yet) a character
PROMPT_CONTEXT = 6  # prompt tokens a decoder sees: they decide the space before the first output token


def _decode_function(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # four times quicker than the wrapper, and called twice a token
        return lambda ids: backend.decode(ids, skip_special_tokens=False)
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """What `decode(skip_special_tokens=True)` leaves out: `all_special_ids` has the ones with a role only."""
    added = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset((*tokenizer.all_special_ids, *added))


class Detokenizer:
    """Text of one growing token sequence; what was returned is never taken back.

    Decodes a short window: a few tokens of left context (they decide spaces) and those not yet shown.
    Trailing replacement characters are held back, because the next token may complete them; the text before
    them is final.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        """Starts behind `prompt_ids`, whose text is not returned."""
        self._decode = _decode_function(tokenizer)
        self._skip = _special_ids(tokenizer) if skip_special_tokens else frozenset()
        tail = [t for t in prompt_ids[-4 * PROMPT_CONTEXT :] if t not in self._skip]
        self._start(tail[-PROMPT_CONTEXT:])

    def _start(self, context: list[int]) -> None:
        self._window = context
        self._context = len(context)
        self._shown = len(self._decode(context)) if context else 0

    def push(self, token: int) -> str:
        """Returns the text that this token makes final; may be empty."""
        if token in self._skip:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        final = text.rstrip(REPLACEMENT)
        new = final[self._shown :]
        self._shown = max(self._shown, len(final))
        if new and len(final) == len(text):  # all is shown: these tokens are the next context
            self._start(self._window[self._context :])
        return new

    def flush(self) -> str:
        """Returns what was held back, with replacement characters for bytes that never became characters."""
        rest = self._decode(self._window)[self._shown :] if self._window else ""
        self._shown += len(rest)
        return rest


class StopChecker:
    """Finds the first stop string in a growing text and holds back what may become one."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stops)
        self._held = ""  # the end of the text, not released: a proper prefix of some stop

    def push(self, text: str, may_stop: bool = True) -> tuple[str, str | None]:
        """Adds text.

        Args:
            text: What follows the text so far.
            may_stop: False while min_tokens is not reached: a stop string that ends in this text is text.

        Returns:
            (text that can be released, the stop string found or None). The stop that ends first counts, of
            two ending together the longer; it and what follows it are not released, and nothing may be
            pushed after it.
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
        """(text before it, the stop) of the stop with the earliest end past `old` characters, or None."""
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
        """Returns the held text: the output ended and it did not become a stop string."""
        rest, self._held = self._held, ""
        return rest
