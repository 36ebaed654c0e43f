"""Lines of training data: JSON lines, one JSON array, lists of records; of every format."""

import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from loquetier_jax.errors import DataError
from loquetier_jax.train.config import TRUNCATIONS, TrainConfig
from loquetier_jax.train.data import Dataset, load_dataset
from loquetier_jax.train.records import check_records
from tests.fuzz.kind import listing
from tests.fuzz.mutate import json_text, json_value, mutate_bytes, mutate_tree, put, python_value
from tests.train.chats import chat_tokenizer

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
IDS = [3, 4, 5, 6]
LONGEST = 4096  # rows of a sample
RECORDS: tuple[dict[str, Any], ...] = (
    {"messages": TURNS},
    {"messages": [{"role": "system", "content": "Be brief."}, *TURNS, *TURNS], "chat_template_kwargs": {}},
    {"messages": [*TURNS, {"role": "assistant", "content": "Ciao", "weight": 0}], "tools": []},
    {"messages": TURNS, "tools": [TOOL], "system": "Be brief.", "history": []},
    {"messages": [TURNS[0], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]},
    {"prompt": "1 + 1 = ", "completion": "2"},
    {"prompt": TURNS[:1], "completion": TURNS[1:]},
    {"instruction": "Add.", "input": "1, 1", "output": "2"},
    {"question": "1 + 1?", "answer": "2"},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello", "train": True}]},
    {"text": "Some words of text, and some more of them."},
    {"input_ids": IDS, "labels": [-100, 4, 5, 6], "attention_mask": [1, 1, 1, 1]},
    {"input_ids": IDS, "completion_mask": [0, 0, 1, 1], "assistant_masks": [0, 0, 1, 1]},
    {"input_ids": np.array(IDS), "labels": np.array(IDS), "position_ids": [0, 1, 2, 3]},
)
WRITABLE = RECORDS[:-1]  # as JSON
CONFIGS = (
    *(TrainConfig(max_steps=1, pack_tokens=LONGEST, truncation=truncation) for truncation in TRUNCATIONS),
    TrainConfig(max_steps=1, pack_tokens=LONGEST, completion_only_loss=False),
    TrainConfig(max_steps=1, pack_tokens=LONGEST, max_length=4, truncation="left"),
)


class DataLines:
    """Data of three records of which one is damaged, or a file damaged as a whole."""

    errors = (DataError,)

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, folder / "data.jsonl"
        self._tokenizer = chat_tokenizer("qwen3")  # it takes tools, and any order of roles
        self._vocab = len(self._tokenizer)
        put(self._file, b"")
        self._look_at(load_dataset(RECORDS, self._tokenizer, CONFIGS[0], vocab_size=self._vocab))

    def attempt(self, rng: random.Random) -> None:
        data = self._records(rng) if rng.random() < 0.3 else self._written(rng)
        try:
            dataset = load_dataset(data, self._tokenizer, rng.choice(CONFIGS), vocab_size=self._vocab)
        except DataError:
            with suppress(DataError):
                check_records(data)
            raise
        check_records(data)  # what is taken in the end is not refused before
        self._look_at(dataset)

    def _records(self, rng: random.Random) -> list[Any]:
        records = [rng.choice(RECORDS) for _ in range(3)]
        at = rng.randrange(3)
        records[at] = mutate_tree(rng, records[at], python_value)
        return records

    def _written(self, rng: random.Random) -> str:
        records = [rng.choice(WRITABLE) for _ in range(3)]
        if whole := rng.random() < 0.5:
            at = rng.randrange(3)
            records[at] = mutate_tree(rng, records[at], json_value)
        lines = [json_text(rng, record) for record in records]
        raw = b"[" + b",\n".join(lines) + b"]" if rng.random() < 0.3 else b"\n".join(lines)
        put(self._file, raw if whole else mutate_bytes(rng, raw))
        return str(self._file)

    def _look_at(self, dataset: Dataset) -> None:
        """What is accepted can be trained."""
        for sample in dataset.samples:
            assert len(sample.tokens) == len(sample.targets) == len(sample.weights) <= LONGEST
            ids = np.concatenate([sample.tokens, sample.targets])
            assert ids.min() >= 0 and ids.max() < self._vocab
            assert np.isin(sample.weights, (0, 1)).all() and sample.weights.any()

    def traces(self) -> list[str]:
        return listing(self._folder)
