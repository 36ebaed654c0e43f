"""The embedded base `tiny-llama-bytes`, a byte-level Llama of 3.9 million parameters, and the code that made it.

- `base/`: an ordinary Hugging Face folder (config, tokenizer, bf16 safetensors).
- `corpus.py`: generates its pretraining text; `words.py` has the words and facts used in it.
- `skills.py`: fine-tuning data whose effect is visible in generated text.
- `tokenizer.py`, `pretrain.py`, `evaluate.py`, `export.py`: how `base/` was made.
"""

from pathlib import Path

BASE_NAME = "tiny-llama-bytes"


def base_path() -> Path:
    """The Hugging Face folder of the embedded base, inside the installed package."""
    return Path(__file__).parent / "base"
