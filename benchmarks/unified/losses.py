"""Prints the losses of a short job as hex floats, to compare two commits on the CPU bit for bit.

Two jobs (rank 5 with dropout, rank 20) train on a small random model while three requests, one on each of two random
adapters and one on the base, are served beside them. What is printed: every loss and gradient norm, the tokens with the
sum of their log-probabilities, a sha256 of each trained adapter, and the fingerprint of the base.

    python -m benchmarks.unified.losses
"""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from loquetier_jax import Engine, LoraConfig, SamplingParams, TrainConfig
from loquetier_jax.adapters.lora import init_weights, resolve_shape
from loquetier_jax.config import Bucket, EngineConfig
from loquetier_jax.models.load import init_random
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.train.data import Dataset, make_sample
from loquetier_jax.train.fingerprint import base_fingerprint

PACK, VOCAB = 64, 272
SERVE = {"prefill": 48, "chunks": 3, "decode": 16}
BUCKETS = (
    Bucket(**SERVE),
    Bucket(**SERVE, packs=1, pack_tokens=PACK),
    Bucket(packs=1, pack_tokens=PACK),
)
CONFIG = EngineConfig(
    max_model_len=128, max_num_seqs=16, max_adapters=9, max_lora_rank=32, train_pages=5, logit_chunk=64,
    slice_layers=1, buckets=BUCKETS,
)  # fmt: skip
SPEC = DecoderSpec(
    model_type="llama", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=96, vocab_size=VOCAB, max_position_embeddings=512, attention_bias=True, qk_norm=True,
    sliding_window=(None, 24), eos_token_ids=(1,),
)  # fmt: skip


def random_data(seed: int, count: int = 16) -> Dataset:
    """Samples of 5 to 40 tokens, three quarters of which are learnt."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 41, count)
    return Dataset(
        f"random-{seed}",
        tuple(make_sample(rng.integers(3, VOCAB, n).tolist(), [*(rng.random(n - 1) < 0.75), True]) for n in lengths),
    )


def add_adapter(engine: Engine, name: str, seed: int, r: int) -> None:
    """A random adapter whose B is not zero."""
    lora = LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear")
    shape = resolve_shape(lora, SPEC)
    weights, rng = init_weights(shape, lora, SPEC, seed), np.random.default_rng(seed)
    for pair in weights.values():
        pair["lora_B"] = (0.05 * rng.normal(size=pair["lora_B"].shape)).astype(np.float32)
    engine.add_adapter(name, weights, shape)


def digest(engine: Engine, name: str) -> str:
    """sha256 of an adapter's float32 weights."""
    weights = engine.adapters.weights(engine.adapters.get(name))
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(weights))).hexdigest()


def run(tied: bool) -> None:
    """Trains and serves once on a model with a head of its own, or one tied to its embedding."""
    spec = SPEC if not tied else DecoderSpec(**(SPEC.__dict__ | {"tie_word_embeddings": True}))
    params = init_random(spec, jax.random.key(0), jnp.float32)
    engine = Engine(spec, params, CONFIG)
    print("base", base_fingerprint(spec, params))
    add_adapter(engine, "a", 1, 8)
    add_adapter(engine, "b", 2, 24)
    train = TrainConfig(max_steps=6, pack_tokens=PACK, per_device_train_batch_size=3, learning_rate=1e-2)
    loras = {
        "five": LoraConfig(r=5, lora_dropout=0.1, target_modules="all-linear"),
        "twenty": LoraConfig(r=20, target_modules=["q_proj", "v_proj", "down_proj"]),
    }
    jobs = [
        engine.finetune(name, random_data(i), lora=lora, train=train) for i, (name, lora) in enumerate(loras.items())
    ]
    engine.wait(lambda: all(job.status == "running" for job in jobs))
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, repetition_penalty=1.1, logprobs=1)
    prompts = [np.random.default_rng(9).integers(3, VOCAB, 21).tolist()]
    for adapter in ("a", "b", None):
        out = engine.generate(prompts, adapter, sampling)[0].outputs[0]
        print("served", adapter, list(out.token_ids), float(out.cumulative_logprob).hex())
    for job in jobs:
        job.wait()
        for line in job.metrics:
            if "loss" in line:
                print(job.name, line["step"], float(line["loss"]).hex(), float(line["grad_norm"]).hex())
        print(job.name, digest(engine, job.name))


def main() -> None:
    """Both kinds of head."""
    jax.config.update("jax_platforms", "cpu")
    for tied in (False, True):
        run(tied)


if __name__ == "__main__":
    main()
