"""A layer's expensive operations in the backward: kept values with their transposes, for train rows only.

`ReplayOps` returns what `ops.ForwardOps` kept and supplies its transpose, so the backward recomputes nothing that was
kept and sees no inference row.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from loquetier_jax.adapters.pages import LoraPages
from loquetier_jax.batch.segments import TrainRows
from loquetier_jax.config import EngineConfig
from loquetier_jax.models.decoder import LayerWeights, gated
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.step.dropout import dropout
from loquetier_jax.step.ops import attend_packs, shrunk
from pallas_kernels import gate_fused, pack_backward_dy, pack_backward_x, pack_expand, pack_glu_backward

Gradients = tuple[jax.Array, jax.Array, jax.Array]  # of a projection's input, of A and of B


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def with_transpose(
    value: Callable[..., jax.Array], transpose: Callable[..., tuple[jax.Array, ...]], *args: jax.Array
) -> jax.Array:
    """value(*args), of which autodiff sees nothing: the gradients of args are transpose(dy, *args)."""
    return value(*args)


with_transpose.defvjp(
    lambda value, transpose, *args: (value(*args), args),
    lambda value, transpose, args, dy: transpose(dy, *args),
)


@dataclass
class ReplayOps:
    """The same operations for train rows only, under `jax.vjp`.

    Attributes:
        lora: By group, the packs' pages, A [G, MP, n*16, in] and B [G, MP, 16, out]: what is differentiated beside x.
        kept: What the forward kept; a name that is missing is recomputed, but for every group's S.
        window_layer: Index whose attention window this layer has (static).
        layer: Index of the layer, traced: only dropout needs it.
    """

    spec: DecoderSpec
    cfg: EngineConfig
    tokens: int
    window_layer: int
    layer: jax.Array
    weights: LayerWeights
    lora: dict[str, LoraPages]
    kept: dict[str, jax.Array]
    train: TrainRows
    use_dropout: bool = False

    def linear(self, group: str, h: jax.Array) -> jax.Array:
        value, transpose = (functools.partial(f, group) for f in (self._project, self._project_transpose))
        return with_transpose(value, transpose, h, self.lora[group].A, self.lora[group].B)

    def mlp(self, h: jax.Array) -> jax.Array:
        gate_up = self.linear("gate_up_proj", h)
        if self.use_dropout or not gate_fused(self.spec.hidden_act, self.cfg.smlm):
            return self.linear("down_proj", gated(self.spec, gate_up))
        lora = self.lora["down_proj"]
        return with_transpose(self._down, self._down_transpose, gate_up, lora.A, lora.B)

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        attend = functools.partial(attend_packs, self.spec, self.cfg, self.window_layer, self.train.rows, self.tokens)
        if "attention" not in self.kept:
            return attend(q, k, v)
        # What of the forward its transpose does not need is dead code.
        return with_transpose(
            lambda *_: self.kept["attention"], lambda dy, *args: jax.vjp(attend, *args)[1](dy), q, k, v
        )

    def _packs(self, rows: jax.Array) -> jax.Array:
        return rows.reshape(-1, self.tokens, *rows.shape[1:])

    def _outs(self, group: str) -> tuple[int, ...]:
        return self.spec.group_shapes[group][1]

    def _drop(self, group: str, h: jax.Array) -> jax.Array:
        """The adapter's input."""
        if not self.use_dropout:
            return h
        rates = jnp.repeat(self.train.drop_rates, self.tokens)
        return dropout(h, self.train.drop_keys, rates, self.layer, group)

    def _shrunk(self, group: str, pages: int) -> jax.Array:
        """The forward's S of as many pages, [G, L, n, MP, 16]."""
        return self._packs(self.kept[shrunk(group)])[:, :, :, :pages]

    def _project(self, group: str, h: jax.Array, lora_A: jax.Array, lora_B: jax.Array) -> jax.Array:
        if group in self.kept:
            return self.kept[group]
        y, S = self.weights[group].dot(h), self._shrunk(group, lora_B.shape[1])
        return y + pack_expand(S, lora_B, self._outs(group)).reshape(y.shape).astype(y.dtype)

    def _base_transpose(self, group: str, dy: jax.Array) -> jax.Array:
        return self.weights[group].dot_transpose(dy)

    def _both_transposes(
        self, group: str, dy: jax.Array, lora_B: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The adapter's dS [G, L, MP, n*16] and dB, and the base's gradient of its input."""
        S = self._shrunk(group, lora_B.shape[1])
        dS, dB = pack_backward_dy(lora_B, S, self._packs(dy), self._outs(group), implementation=self.cfg.smlm)
        # The adapter first: the base's product would throw dy out of the cache.
        dS, dy = jax.lax.optimization_barrier((dS, dy))
        return dS, dB, self._base_transpose(group, dy)

    def _project_transpose(
        self, group: str, dy: jax.Array, h: jax.Array, lora_A: jax.Array, lora_B: jax.Array
    ) -> Gradients:
        dS, dB, dh = self._both_transposes(group, dy, lora_B)
        x, undrop = jax.vjp(functools.partial(self._drop, group), h)
        given = None if self.use_dropout else self._packs(dh)
        dx, dA = pack_backward_x(self._packs(x), lora_A, dS, given, implementation=self.cfg.smlm)
        dx = dx.reshape(h.shape)
        return dh + undrop(dx)[0] if self.use_dropout else dx, dA, dB

    def _down(self, gate_up: jax.Array, lora_A: jax.Array, lora_B: jax.Array) -> jax.Array:
        return self._project("down_proj", gated(self.spec, gate_up), lora_A, lora_B)

    def _down_transpose(
        self, dy: jax.Array, gate_up: jax.Array, lora_A: jax.Array, lora_B: jax.Array
    ) -> Gradients:
        dS, dB, dact = self._both_transposes("down_proj", dy, lora_B)
        d, dA = pack_glu_backward(self._packs(gate_up), lora_A, dS, self._packs(dact), self.spec.hidden_act)
        return d.reshape(gate_up.shape), dA, dB
