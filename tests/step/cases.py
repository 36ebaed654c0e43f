"""A tiny model with random adapters and a mixed batch, shared by the tests of the step."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.running import running
from loquetier_jax.adapters.lora import LoraConfig, LoraShape, LoraWeights, init_weights, resolve_shape
from loquetier_jax.adapters.pages import pages_of
from loquetier_jax.batch.pack import ScoreItem, StepItems, TrainItem, pack_step
from loquetier_jax.batch.packs import Pack
from loquetier_jax.batch.rows import SegmentBatch, ravel
from loquetier_jax.config import Bucket, EngineConfig
from loquetier_jax.models.load import init_random
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.sampling_params import Level, SamplingParams
from loquetier_jax.step.compiled import StepFunctions
from loquetier_jax.step.state import DeviceState, new_state
from loquetier_jax.step.unified import ForwardOut

PACK = 64
SERVE = Bucket(prefill=48, chunks=3, decode=16)
MIXED = Bucket(packs=2, pack_tokens=PACK, score_packs=1, score_tokens=PACK, prefill=48, chunks=3, decode=16)
TRAIN = Bucket(packs=2, pack_tokens=PACK)


def tiny_spec(**changes: object) -> DecoderSpec:
    fields: dict[str, object] = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 160,
        "vocab_size": 272,
        "max_position_embeddings": 512,
        "sliding_window": (None,) * 3,
        "eos_token_ids": (1,),
    }
    return DecoderSpec(**(fields | changes))


def tiny_config(**changes: object) -> EngineConfig:
    fields: dict[str, object] = {
        "max_model_len": 128,
        "max_num_seqs": 16,
        "max_adapters": 12,
        "max_lora_rank": 32,
        "train_pages": 4,
        "logit_chunk": 64,
        "buckets": (SERVE, MIXED),
        "compilation_cache_dir": "",
    }
    return EngineConfig(**(fields | changes))


def random_adapter(
    spec: DecoderSpec, seed: int, r: int = 8, **config: object
) -> tuple[LoraShape, LoraWeights]:
    """An adapter whose B is not zero."""
    lora = LoraConfig(r=r, lora_alpha=2 * r, **({"target_modules": "all-linear"} | config))
    shape = resolve_shape(lora, spec)
    weights = init_weights(shape, lora, spec, seed)
    rng = np.random.default_rng(seed)
    for pair in weights.values():
        pair["lora_B"] = (0.05 * rng.normal(size=pair["lora_B"].shape)).astype(np.float32)
    return shape, weights


@dataclass
class World:
    """One engine's worth of state without an engine."""

    spec: DecoderSpec
    cfg: EngineConfig
    state: DeviceState
    functions: StepFunctions
    adapters: dict[tuple[int, ...], tuple[LoraShape, LoraWeights]]

    def run(self, items: StepItems, bucket: Bucket, dropout: bool = False):
        """Packs and runs one forward; returns (ForwardOut, host batch)."""
        batch = pack_step(items, bucket, self.cfg).batch
        out = self.state.run_forward(self.functions.forward(bucket, dropout), jnp.asarray(ravel(batch)))
        return out, batch

    def sample(self, out: ForwardOut, items: StepItems, bucket: Bucket, level: Level = "greedy"):
        """Draws the tokens of a forward that `run` has run on the same items; see `step.sample.sample`."""
        rows = pack_step(items, bucket, self.cfg).sample
        run = self.functions.sampler(bucket.samples, level)
        return self.state.sample(run, out.sample_hidden, jnp.asarray(ravel(rows)))


@functools.cache
def step_functions(spec: DecoderSpec, cfg: EngineConfig) -> StepFunctions:
    """Compiled functions depend on shapes alone: worlds of one spec and config share them."""
    params = init_random(spec, jax.random.key(0), jnp.dtype(cfg.dtype))
    return StepFunctions(spec, cfg, new_state(spec, cfg, params))


def make_world(spec: DecoderSpec | None = None, cfg: EngineConfig | None = None, seed: int = 0) -> World:
    """Adapters at pages (1,), (2, 3) and (4,), ranks 8, 24 (attention only) and 16."""
    spec, cfg = spec or tiny_spec(), cfg or tiny_config()
    params = init_random(spec, jax.random.key(seed), jnp.dtype(cfg.dtype))
    state = new_state(spec, cfg, params)
    adapters = {
        (1,): random_adapter(spec, 1, 8),
        (2, 3): random_adapter(spec, 2, 24, target_modules=["q_proj", "v_proj", "o_proj"]),
        (4,): random_adapter(spec, 3, 16),
    }
    for pages, (shape, weights) in adapters.items():
        state.write_adapter(pages, pages_of(weights, shape, spec, np.dtype(cfg.dtype)))
    return World(spec, cfg, state, step_functions(spec, cfg), adapters)


def random_pack(
    rng: np.random.Generator, lengths: tuple[int, ...], vocab: int = 272, size: int = PACK
) -> Pack:
    """Samples of these lengths, each starting on a 32-row boundary."""
    tokens, targets = np.zeros(size, np.int32), np.zeros(size, np.int32)
    positions, segments = np.zeros(size, np.int32), np.full(size, -1, np.int32)
    weights = np.zeros(size, np.float32)
    at = 0
    for number, n in enumerate(lengths):
        ids = rng.integers(2, vocab, n + 1)
        cut = slice(at, at + n)
        tokens[cut], targets[cut], positions[cut], segments[cut] = ids[:-1], ids[1:], np.arange(n), number
        weights[cut] = rng.integers(0, 2, n)
        at += -(-n // 32) * 32
    keys = rng.integers(0, 2**32, size, dtype=np.uint32)
    return Pack(
        tokens=tokens,
        targets=targets,
        positions=positions,
        segments=segments,
        weights=weights,
        drop_keys=keys,
        num_targets=int(weights.sum()),
        num_tokens=int((segments >= 0).sum()),
        step=0,
        index=0,
        is_last=True,
        sample_ids=tuple(range(len(lengths))),
    )


GREEDY = SamplingParams(temperature=0, max_tokens=32)


def mixed_items(rng: np.random.Generator) -> StepItems:
    """Two train packs of two adapters, a score pack, two prompt chunks, three decode rows (one without adapter)."""
    prompt = rng.integers(2, 272, 40).astype(np.int32)
    return StepItems(
        train=[
            TrainItem(random_pack(rng, (20, 30)), (1,), (1,)),
            TrainItem(random_pack(rng, (50,)), (2, 3), (2, 3)),
        ],
        score=[ScoreItem(random_pack(rng, (29, 9)), (4,))],
        prefill=[
            (running(0, (4,), (1, 2, 3), GREEDY, prompt[:17]), 17),
            (running(1, (), (4, 5, 6), GREEDY, prompt[17:30]), 13),
        ],
        decode=[
            running(2, (1,), (7, 8), GREEDY, prompt[:5], 1),
            running(3, (), (9, 10), GREEDY, prompt[:20], 1),
            running(4, (2, 3), (11, 12), GREEDY, prompt[:3], 1),
        ],
    )


def flat_of(batch: SegmentBatch) -> jax.Array:
    return jnp.asarray(ravel(batch))
