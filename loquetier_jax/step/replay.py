"""A layer's expensive operations in the backward: kept values with their transposes, for train rows only.

`ReplayOps` returns what `ops.ForwardOps` kept and supplies its transpose, so the backward recomputes nothing that was
kept and sees no inference row.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from loquetier_jax.batch.segments import TrainRows
from loquetier_jax.config import EngineConfig
from loquetier_jax.models.decoder import base_linear, gated
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.step.dropout import dropout
from loquetier_jax.step.ops import attend_packs
from pallas_kernels import pack_lora


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def known(f: Callable[..., jax.Array], y: jax.Array, *args: Any) -> jax.Array:
    """f(*args) whose value y is known already: nothing is computed forward, the transpose is f's."""
    return y


def _known_forward(
    f: Callable[..., jax.Array], y: jax.Array, *args: Any
) -> tuple[jax.Array, tuple[Any, ...]]:
    return y, args


def _known_backward(f: Callable[..., jax.Array], args: tuple[Any, ...], dy: jax.Array) -> tuple[Any, ...]:
    return None, *jax.vjp(f, *args)[1](dy)  # what of f's forward its transpose does not need is dead code


known.defvjp(_known_forward, _known_backward)


@dataclass
class ReplayOps:
    """The same operations for train rows only, under `jax.vjp`.

    Attributes:
        lora: {group: (A [G, MP, n*16, in], B [G, MP, 16, out])} of the packs: what is differentiated beside x.
        kept: What the forward kept; a name that is missing is recomputed.
        window_layer: Index whose attention window this layer has (static).
        layer: Index of the layer, traced: only dropout needs it.
    """

    spec: DecoderSpec
    cfg: EngineConfig
    tokens: int
    window_layer: int
    layer: jax.Array
    weights: dict[str, jax.Array]
    lora: dict[str, tuple[jax.Array, jax.Array]]
    kept: dict[str, jax.Array]
    train: TrainRows
    use_dropout: bool = False

    def _run(self, name: str, f: Callable[..., jax.Array], *args: Any) -> jax.Array:
        return known(f, self.kept[name], *args) if name in self.kept else f(*args)

    def linear(self, group: str, h: jax.Array) -> jax.Array:
        outs = self.spec.group_shapes[group][1]

        def project(h: jax.Array, lora_A: jax.Array, lora_B: jax.Array) -> jax.Array:
            x = h
            if self.use_dropout:
                rates = jnp.repeat(self.train.drop_rates, self.tokens)
                x = dropout(h, self.train.drop_keys, rates, self.layer, group)
            packs = x.reshape(-1, self.tokens, x.shape[1])
            delta = pack_lora(packs, lora_A, lora_B, out_features=outs, implementation=self.cfg.smlm)
            y = base_linear(self.weights, group, h)
            return y + delta.reshape(y.shape).astype(y.dtype)

        return self._run(group, project, h, *self.lora[group])

    def mlp(self, h: jax.Array) -> jax.Array:
        return self.linear("down_proj", gated(self.spec, self.linear("gate_up_proj", h)))

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        attend = functools.partial(
            attend_packs, self.spec, self.cfg, self.window_layer, self.train.rows, self.tokens
        )
        return self._run("attention", attend, q, k, v)
