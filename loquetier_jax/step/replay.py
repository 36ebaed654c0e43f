"""A layer's expensive operations in the backward: kept values with their transposes, for train rows only.

`ReplayOps` returns what `ops.ForwardOps` kept and supplies the transposes, so that the backward recomputes nothing that
was kept and processes no inference rows.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from loquetier_jax.adapters.pages import LoraPages
from loquetier_jax.batch.rows import TrainRows
from loquetier_jax.config import EngineConfig
from loquetier_jax.models.decoder import LayerWeights, gated
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.step.dropout import dropout
from loquetier_jax.step.ops import attend_packs, shrunk
from pallas_kernels import SmlmPlan, smlm_bwd
from pallas_kernels.smlm import smlm_expand

Gradients = tuple[jax.Array, jax.Array, jax.Array]  # with respect to a projection's input, A and B


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def with_transpose(
    value: Callable[..., jax.Array], transpose: Callable[..., tuple[jax.Array, ...]], *args: jax.Array
) -> jax.Array:
    """value(*args), opaque to autodiff: the gradients of args are transpose(dy, *args)."""
    return value(*args)


with_transpose.defvjp(
    lambda value, transpose, *args: (value(*args), args),
    lambda value, transpose, args, dy: transpose(dy, *args),
)


@dataclass
class ReplayOps:
    """The same operations for train rows only, under `jax.vjp`.

    Attributes:
        pages: The layer's adapter pages by group, from which the packs' pages are read.
        plan: `pack_plan` of the packs.
        taps: By group A [G, MP, n*16, in] and B [G, MP, 16, out], float32: differentiated along with x, in place of the
            packs' own pages. No value depends on them; their cotangents are the gradients of every pack.
        kept: What the forward kept; missing names are recomputed, but every group's S is required.
        window_layer: Static index of the layer whose attention window applies.
        layer: Traced index of the layer, used only by dropout.
    """

    spec: DecoderSpec
    cfg: EngineConfig
    tokens: int
    window_layer: int
    layer: jax.Array
    weights: LayerWeights
    pages: dict[str, LoraPages]
    plan: SmlmPlan
    taps: dict[str, LoraPages]
    kept: dict[str, jax.Array]
    train: TrainRows
    use_dropout: bool = False

    def linear(self, group: str, h: Float[Array, "T in"]) -> Float[Array, "T out"]:
        value, transpose = (functools.partial(f, group) for f in (self._project, self._project_transpose))
        return with_transpose(value, transpose, h, self.taps[group].A, self.taps[group].B)

    def mlp(self, h: Float[Array, "T D"]) -> Float[Array, "T D"]:
        gate_up = self.linear("gate_up_proj", h)
        if self.use_dropout:  # dropout comes between the activation and the adapter, so they cannot be fused
            return self.linear("down_proj", gated(self.spec, gate_up))
        taps = self.taps["down_proj"]
        return with_transpose(self._down, self._down_transpose, gate_up, taps.A, taps.B)

    def attend(
        self, q: Float[Array, "T N H"], k: Float[Array, "T K H"], v: Float[Array, "T K H"]
    ) -> Float[Array, "T NH"]:
        attend = functools.partial(attend_packs, self.spec, self.cfg, self.window_layer, self.train.rows, self.tokens)
        if "attention" not in self.kept:
            return attend(q, k, v)
        # XLA drops the parts of the recomputed forward that the VJP does not use.
        return with_transpose(
            lambda *_: self.kept["attention"], lambda dy, *args: jax.vjp(attend, *args)[1](dy), q, k, v
        )

    def _drop(self, group: str, h: jax.Array) -> jax.Array:
        """The adapter's input: h after dropout, if any."""
        if not self.use_dropout:
            return h
        rates = jnp.repeat(self.train.drop_rates, self.tokens)
        return dropout(h, self.train.drop_keys, rates, self.layer, group)

    def _project(self, group: str, h: jax.Array, *taps: jax.Array) -> jax.Array:
        if group in self.kept:
            return self.kept[group]
        y, outs = self.weights[group].dot(h), self.spec.group_shapes[group][1]
        return y + smlm_expand(self.kept[shrunk(group)], self.pages[group].B, self.plan, out_features=outs)

    def _base_transpose(self, group: str, dy: jax.Array) -> jax.Array:
        return self.weights[group].dot_transpose(dy)

    def _adapter_transpose(
        self, group: str, dy: jax.Array, x: jax.Array | None, **options: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        return smlm_bwd(
            self.kept[shrunk(group)],
            x,
            self.pages[group].A,
            self.pages[group].B,
            self.plan,
            dy,
            out_features=self.spec.group_shapes[group][1],
            implementation=self.cfg.smlm,
            **options,
        )

    def _project_transpose(self, group: str, dy: jax.Array, h: jax.Array, *taps: jax.Array) -> Gradients:
        base = functools.partial(self._base_transpose, group)
        if not self.use_dropout:
            return self._adapter_transpose(group, dy, h, dx=base)
        x, undrop = jax.vjp(functools.partial(self._drop, group), h)
        dx, dA, dB = self._adapter_transpose(group, dy, x)
        dx, dy = jax.lax.optimization_barrier((dx, dy))  # adapter first, while dy is in the cache
        return base(dy) + undrop(dx)[0], dA, dB

    def _down(self, gate_up: jax.Array, *taps: jax.Array) -> jax.Array:
        return self._project("down_proj", gated(self.spec, gate_up), *taps)

    def _down_transpose(self, dy: jax.Array, gate_up: jax.Array, *taps: jax.Array) -> Gradients:
        base = functools.partial(self._base_transpose, "down_proj")
        glu = (self.spec.hidden_act, gate_up)
        return self._adapter_transpose("down_proj", dy, None, dx=base, glu=glu)
