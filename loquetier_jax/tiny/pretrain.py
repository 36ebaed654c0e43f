"""Pretrains the embedded base on generated text and writes it as a Hugging Face folder.

    python -m loquetier_jax.tiny.pretrain --out base/            # minutes on one GPU, a day on a CPU
    python -m loquetier_jax.tiny.pretrain --out trial/ --steps 20 --tokens 3e5 --batch-tokens 2048

f32 parameters, bf16 compute, AdamW, linear warm-up and cosine decay. Most steps use short rows (cheap
attention), the last ones rows of the full context length.
"""

import argparse
import json
import logging
import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, UInt16

from loquetier_jax.models.linear import Dense
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.tiny import corpus, evaluate, tokenizer
from loquetier_jax.tiny.export import save_base

logger = logging.getLogger(__name__)

CONTEXT = 1024
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": tokenizer.VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 576,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "bos_token_id": tokenizer.BOS,
    "eos_token_id": [tokenizer.EOS, tokenizer.END],
    "pad_token_id": tokenizer.PAD,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}


@dataclass(frozen=True)
class Stage:
    """Row length used until the run's progress reaches `until` (0 to 1)."""

    length: int
    until: float


STAGES = (Stage(256, 0.8), Stage(CONTEXT, 1.0))
Rows = UInt16[np.ndarray, "B T"]


def _shard(job: tuple[str, int, int]) -> Rows:
    return np.array(list(corpus.rows(*job)), np.uint16)


def generate(seed: int, tokens: int, length: int, shards: int = 64) -> Rows:
    """About `tokens` token ids of training text in rows of `length`, generated on all cores.

    The number of shards is fixed so that the text does not depend on the machine.
    """
    count = max(1, tokens // length // shards)
    jobs = [(f"train {seed} {length} {i}", count, length) for i in range(shards)]
    with multiprocessing.get_context("spawn").Pool(min(os.cpu_count() or 1, shards)) as pool:
        return np.concatenate(pool.map(_shard, jobs))


def init(spec: DecoderSpec, seed: int) -> dict[str, Any]:
    """f32 parameters with std 0.02, smaller by sqrt(2 L) for projections into the residual stream; norms are 1."""
    rng = np.random.default_rng(seed)
    deep = (2 * spec.num_hidden_layers) ** -0.5

    def normal(*shape: int, scale: float = 1.0) -> Array:
        return jnp.asarray(rng.normal(0.0, 0.02 * scale, shape), jnp.float32)

    def layer() -> dict[str, Array | Dense]:
        norms = ("input_layernorm", "post_attention_layernorm")
        weights = {name: jnp.ones(spec.hidden_size, jnp.float32) for name in norms}
        for group, (width, outs) in spec.group_shapes.items():
            scale = deep if group in ("o_proj", "down_proj") else 1.0
            weights[group] = Dense(normal(width, sum(outs), scale=scale))
        return weights

    return {
        "embed_tokens": normal(spec.vocab_size, spec.hidden_size),
        "layers": [layer() for _ in range(spec.num_hidden_layers)],
        "norm": jnp.ones(spec.hidden_size, jnp.float32),
    }


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, params)


def make_optimizer() -> optax.GradientTransformationExtraArgs:
    """AdamW with clipping and weight decay on matrices only; the learning rate is set before every step."""

    def adamw(learning_rate: float) -> optax.GradientTransformation:
        scale = optax.adamw(learning_rate, b1=0.9, b2=0.98, weight_decay=0.1, mask=_matrices)
        return optax.chain(optax.clip_by_global_norm(1.0), scale)

    return optax.inject_hyperparams(adamw)(learning_rate=0.0)


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over 2% of the run, then cosine decay to 1% of the peak."""
    if progress < 0.02:
        return peak * progress / 0.02
    return peak * (0.01 + 0.99 * 0.5 * (1 + float(np.cos(np.pi * (progress - 0.02) / 0.98))))


def cast(params: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """The parameters in another dtype."""
    return jax.tree.map(lambda x: x.astype(dtype), params)


class Run:
    """One pretraining run. Owns the parameters and optimizer state, which are donated to every step.

    Args:
        spec: Architecture.
        args: Parsed command line, see `parse`.
    """

    def __init__(self, spec: DecoderSpec, args: argparse.Namespace) -> None:
        self.spec, self.args = spec, args
        self.params = init(spec, args.seed)
        self.optimizer = make_optimizer()
        self.state = self.optimizer.init(self.params)
        self.step = jax.jit(self._step, donate_argnums=(0, 1))

    def _step(self, params: Any, state: Any, tokens: Array, rate: Array) -> tuple[Any, Any, Array]:
        def objective(params: Any) -> Array:
            return evaluate.loss(self.spec, cast(params, jnp.bfloat16), tokens)

        value, grads = jax.value_and_grad(objective)(params)
        state.hyperparams["learning_rate"] = rate
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
            updates, state = self.optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    def progress(self, step: int, started: float) -> float:
        """Fraction of the run that is done, by time if `--seconds` is given, else by steps."""
        if self.args.seconds:
            return min(1.0, (time.perf_counter() - started) / self.args.seconds)
        return step / self.args.steps

    def train(self, data: dict[int, Rows]) -> list[dict[str, float]]:
        """Trains on random rows to the end; logs and returns one record every `--log-every` steps."""
        rng, records = np.random.default_rng(self.args.seed), []
        started, step = time.perf_counter(), 0
        while (progress := self.progress(step, started)) < 1.0:
            length = next(stage.length for stage in STAGES if progress < stage.until)
            rate = learning_rate(progress, self.args.learning_rate)
            picked = rng.integers(0, len(data[length]), max(1, self.args.batch_tokens // length))
            tokens = data[length][picked].astype(np.int32)
            self.params, self.state, value = self.step(self.params, self.state, tokens, jnp.float32(rate))
            step += 1
            if step % self.args.log_every == 0:  # float(value) also keeps the host from running ahead
                record = {"step": step, "length": length, "loss": float(value), "learning_rate": rate}
                records.append(record | {"seconds": time.perf_counter() - started})
                logger.info(json.dumps(records[-1]))
        return records


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses `arguments`, or the process's own if None."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seconds", type=float, default=0.0, help="train for this long instead of --steps")
    parser.add_argument("--tokens", type=float, default=200e6, help="token ids of text to generate")
    parser.add_argument("--batch-tokens", type=int, default=32768)
    parser.add_argument("--learning-rate", type=float, default=2.5e-3)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--eval-count", type=int, default=64, help="exchanges per skill in the final evaluation")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main() -> None:
    """Command line: generates text, trains, writes the model and evaluates it."""
    args = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    spec = DecoderSpec.from_hf(CONFIG)
    started, before, data = time.perf_counter(), 0.0, {}
    for stage in STAGES:
        data[stage.length] = generate(args.seed, int(args.tokens * (stage.until - before)), stage.length)
        before = stage.until
    shapes = {length: rows.shape for length, rows in data.items()}
    logger.info("rows %s in %.0f s", shapes, time.perf_counter() - started)
    run = Run(spec, args)
    records = run.train(data)
    save_base(args.out, CONFIG, spec, run.params)
    rounded = cast(cast(run.params, jnp.bfloat16), jnp.float32)  # the weights as written
    result = evaluate.report(spec, rounded, count=args.eval_count)
    (args.out / "training.json").write_text(json.dumps({"records": records, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
