"""loquetier_jax: trains and serves many LoRA adapters at once on one frozen base model, in JAX.

    from loquetier_jax import Engine, LoraConfig, SamplingParams, TrainConfig

Dimension letters used throughout:

| letter | dimension | name in a Hugging Face config |
|---|---|---|
| B | batch | |
| T | rows of a step: token positions in flat order | |
| D | width of the residual stream | `hidden_size` |
| N | query heads | `num_attention_heads` |
| K | key and value heads | `num_key_value_heads` |
| H | width of a head | `head_dim` |
| F | width of the MLP | `intermediate_size` |
| V | vocabulary | `vocab_size` |
| L | layers | `num_hidden_layers` |
| R | ranks of one adapter page: 16 | |
| P | pages: of adapters (16 ranks each) or of KV cache (S tokens each) | |
| MP | most pages one adapter may take | |
| TP | pages of the gradient pool | |
| G | packs of training rows in a step | |
| n | projections fused into one group, e.g. 3 in `qkv_proj` | |

Glossary:

| word | meaning |
|---|---|
| step, iteration | one round of the loop: a forward (with its sampler) for one scheduling decision, then its quanta |
| bucket | the static shape of a compiled forward: numbers of train, score, prefill and decode rows |
| pack | samples of one job, or sequences to score, concatenated in a fixed number of rows |
| score rows | rows whose targets' log-probs are computed without training: evaluation, `log_probs`, `prompt_logprobs` |
| pass, micro-step | forward and backward of a few packs, possibly of several jobs; one or more per optimizer step |
| kept activations | results of train rows that the forward keeps, so that the backward need not recompute them |
| quantum | a piece of training or scoring work that the scheduler places after a step's forward |
| headroom | milliseconds that the latency targets (SLO) leave for quanta before a token would be late |
| slot | index of a running request's state on the device: last token and penalty counts |
| page (KV) | `kv_page_size` token positions of the KV cache, in every layer; page 0 takes the writes of padding rows |
| prefix, block | the beginning of a request as the prefix cache sees it, and one full KV page of it |
| page (adapter) | 16 ranks of an adapter, in all layers and targets; page 0 is all zeros and means "no adapter" |
| gradient pool | f32 pages in which the gradients of jobs accumulate until their optimizer steps; page 0 is trash |
| master | a job's exact-rank f32 weights; every optimizer step casts them to the job's adapter pages |
| group | projections with the same input, fused into one GEMM: qkv, o, gate_up, down |
| S | the LoRA intermediate x A^T, the same name in kernels and kept activations |
| version | immutable weights of an adapter; a name points to one version, a request keeps the one it arrived with |
| hold, acquire | a waiting request holds a version (alive, but evictable); a running one acquires it (pages stay) |
| residency | where a version's weights are: device pages, host memory, or a PEFT folder |
| host copy | a version's pages in one buffer of host memory, in the compute dtype; names of one folder share it |
| load, stage | a loader thread transfers a host copy to the device (staged); the loop writes it to pages, in one call |
| publish | points a name to a job's current weights: the new version takes over the job's pages, nothing is copied |
| placeholder | the version behind a new job's name until the first publish (untrained), or behind a failed name |
| epoch | number of a dispatched step; freed slots and pages are reused once the last epoch that used them is complete |
| driver | runs the loop one step at a time, in the thread of a waiting caller or in a thread of its own |
| inbox, command | functions that other threads queue for the loop; run under its lock, in order, between steps |

Names resolve on first use, so that `loquetier_jax.config`, the scheduler and other host-only modules import
without jax.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

from loquetier_jax.config import Bucket, EngineConfig, SLOConfig
from loquetier_jax.errors import (
    AdapterError,
    CapacityError,
    CheckpointError,
    ConfigError,
    DataError,
    EngineError,
    IntegrityError,
    JobError,
    LoquetierError,
    ModelError,
    RequestError,
)

if TYPE_CHECKING:
    from loquetier_jax.adapters.lora import LoraConfig
    from loquetier_jax.engine import Engine
    from loquetier_jax.sampling_params import SamplingParams
    from loquetier_jax.step.loss_batch import LossBatch
    from loquetier_jax.train.config import TrainConfig

__version__ = "0.1.0"

# transformers warns at import when torch is missing; nothing here needs torch.
logging.getLogger("transformers").addFilter(lambda record: not str(record.msg).startswith("PyTorch was not found"))

# Public name -> the module that defines it.
_LAZY = {
    "Engine": "loquetier_jax.engine",
    "LoraConfig": "loquetier_jax.adapters.lora",
    "LossBatch": "loquetier_jax.step.loss_batch",
    "SamplingParams": "loquetier_jax.sampling_params",
    "TrainConfig": "loquetier_jax.train.config",
}

__all__ = [
    "AdapterError",
    "Bucket",
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Engine",
    "EngineConfig",
    "EngineError",
    "IntegrityError",
    "JobError",
    "LoquetierError",
    "LoraConfig",
    "LossBatch",
    "ModelError",
    "RequestError",
    "SLOConfig",
    "SamplingParams",
    "TrainConfig",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
