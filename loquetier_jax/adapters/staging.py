"""The way of an adapter's flat pages to the device, in any thread but the loop's."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int, Shaped

from loquetier_jax.adapters.flat import FlatPages
from loquetier_jax.adapters.pages import AdapterPages, LoraPages, padded
from loquetier_jax.config import RANK_PAGE
from loquetier_jax.models.spec import DecoderSpec


def stager(
    spec: DecoderSpec, unpacker: Callable[[int], Callable[..., Any]] | None = None
) -> Callable[[FlatPages], AdapterPages]:
    """`stage` of `residency.PageTransfers`: flat pages on the host -> padded pages on the device, for `write_pages`.

    One transfer, which runs beside the steps and is awaited; then the buffer is taken apart layer by layer, queued
    behind the steps under way, for which nobody waits.

    Args:
        spec: The base.
        unpacker: Gives `layer_of` of `spec`, compiled, by number of pages; None compiles it when it is first called.
    """

    def stage(flat: FlatPages) -> AdapterPages:
        there = jax.block_until_ready(jax.device_put(padded(flat)))
        layer = partial(layer_of, spec) if unpacker is None else unpacker(len(there))
        return AdapterPages([layer(there, np.int32(i)) for i in range(spec.num_hidden_layers)])

    return stage


@partial(jax.jit, static_argnums=0)
def layer_of(spec: DecoderSpec, flat: Shaped[Array, "pages N"], index: Int[Array, ""]) -> dict[str, LoraPages]:
    """The pages of one layer of flat ones; the same function for all layers."""
    size = flat.shape[1] // spec.num_hidden_layers
    columns, start, found = jax.lax.dynamic_slice_in_dim(flat, index * size, size, 1), 0, {}
    for group, (features, outs) in sorted(spec.group_shapes.items()):
        ranks, out = len(outs) * RANK_PAGE, sum(outs)
        middle = start + ranks * features
        end = middle + RANK_PAGE * out
        a, b = columns[:, start:middle], columns[:, middle:end]
        found[group] = LoraPages(a.reshape(-1, ranks, features), b.reshape(-1, RANK_PAGE, out))
        start = end
    return found
