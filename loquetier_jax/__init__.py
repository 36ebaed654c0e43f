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
