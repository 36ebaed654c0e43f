"""A custom loss: a function of per-token log-probabilities. Here, learn one answer and unlearn another.

Every pair has a preferred and a rejected answer. The preferred one gets the usual -log p; the rejected one gets
-log(1 - p), the unlikelihood loss of Welleck et al. (2019, arXiv 1908.04319), whose gradient stays bounded where
that of the negated log-likelihood loss would diverge.

The loss gets one pack: the log-probs of its targets, their weights, and a `LossBatch` with its samples and their
named extras, here how much an answer is liked. It is ordinary jax and returns a sum over the pack; a loss that does
not need the samples takes only the first two arguments. `-(weights * batch.to_rows(batch.extras["advantage"]) *
logp).sum()` is REINFORCE; with old log-probs per row it becomes PPO or GRPO; `05_dpo.py` is DPO.

    python examples/03_own_loss.py
"""

import jax
import jax.numpy as jnp
import numpy as np

from loquetier_jax import Engine, LoraConfig, LossBatch, TrainConfig
from loquetier_jax.config import Bucket
from loquetier_jax.tiny import base_path
from loquetier_jax.tiny.skills import dataset
from loquetier_jax.train.data import Dataset, Sample

BUCKETS = (
    Bucket(prefill=48, chunks=3, decode=16),
    Bucket(packs=1, pack_tokens=256),
    Bucket(score_packs=1, score_tokens=256, decode=16),
)


def preference(logp: jax.Array, weights: jax.Array, batch: LossBatch) -> jax.Array:
    """Sum of the token losses of one pack: likelihood where liked > 0, unlikelihood elsewhere."""
    liked = batch.to_rows(batch.extras["liked"])
    p = jnp.exp(jnp.minimum(logp, -1e-3))  # below 1, so that log(1 - p) stays finite
    losses = jnp.where(liked > 0, -liked * logp, liked * jnp.log1p(-p))
    return (weights * losses).sum()


def sample(engine: Engine, prompt: str, answer: str, liked: float) -> Sample:
    """One training sample with loss on its answer; targets[i] follows tokens[i]."""
    start = len(engine.tokenizer.encode(prompt))
    ids = np.asarray([*engine.tokenizer.encode(prompt + answer), engine.tokenizer.eos_token_id], np.int32)
    weights = np.zeros(len(ids) - 1, np.float32)
    weights[start - 1 :] = 1.0
    return Sample(tokens=ids[:-1], targets=ids[1:], weights=weights, extras={"liked": np.float32(liked)})


def mean_logp(engine: Engine, pairs: list[tuple[str, str]], adapter: str | None) -> float:
    """Mean log-probability of an answer token."""
    texts = [prompt + answer for prompt, answer in pairs]
    scores = engine.log_probs(texts, adapter)
    starts = [len(engine.tokenizer.encode(prompt)) - 1 for prompt, _ in pairs]
    return float(np.concatenate([s[start:] for s, start in zip(scores, starts, strict=True)]).mean())


def main(steps: int = 16) -> None:
    """Runs the example with `steps` optimizer steps."""
    engine = Engine.from_pretrained(base_path(), config="demo", buckets=BUCKETS)
    rows = zip(dataset("polite", 160, seed=0), dataset("shout", 160, seed=0), strict=True)
    pairs = [(a["prompt"], a["completion"], b["completion"]) for a, b in rows]  # same questions, two styles
    train, held_out = pairs[:144], pairs[144:]
    samples = []
    for prompt, polite, shout in train:
        samples += [sample(engine, prompt, polite, 1.0), sample(engine, prompt, shout, -0.5)]

    job = engine.finetune(
        "polite",
        Dataset("pairs", tuple(samples)),
        lora=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        train=TrainConfig(max_steps=steps, learning_rate=3e-3, pack_tokens=256, loss=preference),
    ).wait()
    print("loss", " ".join(f"{line['loss']:.2f}" for line in job.metrics))

    print("mean log-probability of an answer token, held-out questions:")
    for name, column in (("polite (preferred)", 1), ("shout (rejected)", 2)):
        texts = [(pair[0], pair[column]) for pair in held_out]
        before, after = mean_logp(engine, texts, None), mean_logp(engine, texts, "polite")
        print(f"  {name:20} base {before:6.2f}   adapter {after:6.2f}")


if __name__ == "__main__":
    main()
