"""The embedded base `tiny-llama-bytes`: a byte-level Llama of 3.9 million parameters, with all that made it.

- `base/`: an ordinary Hugging Face folder (config, tokenizer, bf16 safetensors).
- `corpus.py`: the text it was pretrained on, generated; `words.py` is its vocabulary and its small world.
- `skills.py`: fine-tuning data whose effect shows in plain text.
- `tokenizer.py`, `pretrain.py`, `evaluate.py`, `export.py`: how `base/` was made.
"""

from pathlib import Path

BASE_NAME = "tiny-llama-bytes"


def base_path() -> Path:
    """The Hugging Face folder of the embedded base, inside the installed package."""
    return Path(__file__).parent / "base"
