"""The type of tokenizers, for annotations: importing transformers takes a second, and prompts of ids do without."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:
    PreTrainedTokenizerBase = Any

__all__ = ["PreTrainedTokenizerBase"]
