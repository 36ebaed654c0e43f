"""The paged KV cache on the device."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from numpy.typing import DTypeLike

from loquetier_jax.config import EngineConfig
from loquetier_jax.models.spec import DecoderSpec


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """The KV pages of one layer; page 0 is the trash page.

    Attributes:
        k, v: [pages, page_size, K, H] in the compute dtype; keys are rotated.
    """

    k: Float[Array, "pages page_size K H"]
    v: Float[Array, "pages page_size K H"]

    @classmethod
    def empty(cls, spec: DecoderSpec, cfg: EngineConfig, dtype: DTypeLike) -> "KVCache":
        """Pages of zeros."""
        shape = (cfg.kv_pages, cfg.kv_page_size, spec.num_key_value_heads, spec.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def write(
        self, page: Int[Array, " T"], offset: Int[Array, " T"], k: Float[Array, "T K H"], v: Float[Array, "T K H"]
    ) -> "KVCache":
        """Writes each row's key and value at (page, offset); in place if the buffers are donated."""
        return KVCache(self.k.at[page, offset].set(k), self.v.at[page, offset].set(v))
