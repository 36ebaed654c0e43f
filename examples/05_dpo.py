"""DPO (Rafailov et al. 2023, arXiv 2305.18290): prefer one of two answers, relative to the base.

Both answers of a pair are samples of one pack. The base's log-probs of them are computed once, by the training
forward, and passed to the loss as named extras. Before any training the loss is log 2.

    python examples/05_dpo.py
"""

import dataclasses

import jax
import jax.numpy as jnp

from loquetier_jax import Engine, LoraConfig, LossBatch, TrainConfig
from loquetier_jax.config import Bucket
from loquetier_jax.tiny import base_path
from loquetier_jax.tiny.skills import dataset
from loquetier_jax.train.data import Dataset, load_dataset

BETA = 0.1
BUCKETS = (
    Bucket(prefill=48, chunks=3, decode=16),
    Bucket(packs=1, pack_tokens=256),
    Bucket(score_packs=1, score_tokens=256, decode=16),
)


def dpo(logp: jax.Array, weights: jax.Array, batch: LossBatch) -> jax.Array:
    """Sum over the pairs of a pack; samples 2i and 2i + 1 are the chosen and the rejected answer."""
    gain = batch.sum_by_sample(weights * (logp - batch.extras["ref_logp"]))
    losses = -jax.nn.log_sigmoid(BETA * (gain[0::2] - gain[1::2]))
    return jnp.where(batch.sample_mask[0::2], losses, 0.0).sum()


def with_reference(engine: Engine, answers: Dataset) -> Dataset:
    """Adds to every answer its log-probs under the base."""
    sequences = [[*sample.tokens.tolist(), int(sample.targets[-1])] for sample in answers.samples]
    pairs = zip(answers.samples, engine.log_probs(sequences), strict=True)
    samples = tuple(dataclasses.replace(sample, extras={"ref_logp": logp}) for sample, logp in pairs)
    return Dataset(answers.name, samples, group_size=2)


def main(steps: int = 16, questions: int = 96) -> None:
    """Runs the example with `steps` optimizer steps, on the short ones of `questions` questions."""
    engine = Engine.from_pretrained(base_path(), config="demo", buckets=BUCKETS)
    pairs = zip(dataset("polite", questions, seed=0), dataset("shout", questions, seed=0), strict=True)
    short = [pair for pair in pairs if len(pair[0]["prompt"]) < 50]  # both answers fit one pack
    records = [record for pair in short for record in pair]  # chosen, rejected, chosen, rejected, ...
    train = TrainConfig(max_steps=steps, per_device_train_batch_size=4, learning_rate=5e-4, pack_tokens=256,
                        loss=dpo, loss_per="group")  # fmt: skip
    data, held_out = (
        with_reference(engine, load_dataset(part, engine.tokenizer, train)) for part in (records[:-16], records[-16:])
    )
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    job = engine.finetune("polite", data, eval_data=held_out, lora=lora, train=train).wait()
    print("loss", " ".join(f"{line['loss']:.4f}" for line in job.metrics if "loss" in line))
    print(f"held-out pairs {job.metrics[-1]['eval_loss']:.4f}")


if __name__ == "__main__":
    main()
