"""Data, prompts and sizes at the engine's gates: refused before anything is read, initialized or compiled."""

import numpy as np
import pytest

from loquetier_jax.adapters.lora import LoraConfig
from loquetier_jax.errors import AdapterError, ConfigError, DataError, JobError
from loquetier_jax.train.config import TrainConfig
from loquetier_jax.train.data import Dataset, make_sample
from tests.engine.engines import greedy, random_data
from tests.engine.evidence import LORA, quick


def unread():
    """Data that nobody may ask for."""
    pytest.fail("the data was read")
    yield


def test_a_token_id_that_the_model_has_not_is_refused_in_training_and_held_out_data(tiny_engine):
    """It was trained as the last row of the embedding, or ended as a loss of NaN when all was trained."""
    size = tiny_engine.spec.vocab_size
    good = [{"input_ids": [3, 4, 5]}]
    bad = [{"input_ids": [3, size]}, Dataset("made", (make_sample([3, size], [True] * 2),))]
    for data in ([bad[0]], bad[1]):
        with pytest.raises(DataError, match=rf"\[0\]: got token id {size}, expected ids in \[0, {size}\)"):
            tiny_engine.finetune("job", data, lora=LORA, train=quick())
        with pytest.raises(DataError, match=rf"\[0\]: got token id {size}"):
            tiny_engine.finetune("job", good, eval_data=data, lora=LORA, train=quick())
    assert "job" not in tiny_engine.adapters and not tiny_engine.jobs


def test_sizes_are_checked_before_anything_is_read_or_initialized(tiny_engine):
    """A rank of a million took 46 s and 12 GB to be refused, with the lock held: this one would take terabytes."""
    for lora in (LoraConfig(r=10**9), LoraConfig(rank_pattern={"layers.0.self_attn.q_proj": 10**9})):
        with pytest.raises(AdapterError, match="job: got rank 1000000000, expected at most"):
            tiny_engine.finetune("job", unread(), lora=lora, train=quick())
    with pytest.raises(JobError, match="eval_data: got pack_tokens 4096, expected"):
        tiny_engine.finetune("job", unread(), eval_data=unread(), lora=LORA, train=quick(pack_tokens=4096))
    with pytest.raises(ConfigError, match="bf16: got True, expected false: this engine computes in float32"):
        tiny_engine.finetune("job", unread(), lora=LORA, train=quick(bf16=True))
    with pytest.raises(AdapterError, match="'nobody'"):
        tiny_engine.finetune("job", unread(), init_from="nobody", train=quick())


def test_what_was_cut_is_in_the_handle_and_first_in_the_metrics(tiny_engine):
    records = ({"text": "a" * n} for n in (10, 300, 300))
    eval_data = [{"text": "b" * 90}, {"text": ""}]
    train = TrainConfig(max_length=50, max_steps=1)
    job = tiny_engine.finetune("job", records, eval_data=eval_data, lora=LORA, train=train)
    assert (len(job.data), job.data.num_truncated, job.data.num_dropped) == (3, 2, 0)
    assert (len(job.eval_data), job.eval_data.num_truncated, job.eval_data.num_empty) == (1, 1, 1)
    (line,) = job.metrics
    assert (line["step"], line["num_truncated"], line["eval_num_empty"]) == (0, 2, 1)
    job.cancel()
    whole = tiny_engine.finetune("whole", random_data(0), lora=LORA, train=quick())
    assert whole.metrics == [] and whole.eval_data is None and whole.data.left_out == {}
    whole.cancel()


def test_prompts_of_numpy_and_outputs_without_a_bound(tiny_engine):
    ids = list(range(20, 140))
    listed, array = tiny_engine.generate([ids, np.array(ids)], params=greedy(None))
    room = tiny_engine.cfg.max_model_len - len(ids)
    assert listed.outputs[0].token_ids == array.outputs[0].token_ids
    assert len(array.outputs[0].token_ids) == room and array.outputs[0].finish_reason == "length"
    (scores,) = tiny_engine.log_probs(np.array([ids[:9]]))
    assert np.array_equal(scores, tiny_engine.log_probs([ids[:9]])[0])
