"""A byte-level tokenizer (one token a byte, plus four special ones) and synthetic data."""

import numpy as np
import pytest

from loquetier_jax.train.data import Dataset, make_sample

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eot>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<bos>", "<eos>", "<eot>", "<|assistant|>")


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL))
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", core.token_to_id("<bos>"))]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>")
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def make_data():
    """Returns lengths -> Dataset of samples with those many rows; every row's target is unique."""

    def make(lengths, name="made"):
        start, samples = 1, []
        for n in lengths:
            ids = np.arange(start, start + n + 1)
            samples.append(make_sample(ids, np.ones(n + 1, bool)))
            start += n + 1
        return Dataset(name, tuple(samples))

    return make
