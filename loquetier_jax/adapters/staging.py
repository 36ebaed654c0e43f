"""The way of an adapter's flat pages to the device, in any thread but the loop's."""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Int, Shaped

from loquetier_jax.adapters.flat import FlatPages
from loquetier_jax.adapters.pages import AdapterPages, LoraPages, padded
from loquetier_jax.config import RANK_PAGE
from loquetier_jax.models.spec import DecoderSpec


def stager(spec: DecoderSpec) -> Callable[[FlatPages], AdapterPages]:
    """`stage` of `residency.PageTransfers`: flat pages on the host -> padded pages on the device, for `write_pages`.

    One transfer, which runs beside the steps and is awaited; then the buffer is taken apart layer by layer, queued
    behind the steps under way, for which nobody waits.
    """
    groups = tuple(
        (group, len(outs) * RANK_PAGE, features, sum(outs))
        for group, (features, outs) in sorted(spec.group_shapes.items())
    )

    def stage(flat: FlatPages) -> AdapterPages:
        there = jax.block_until_ready(jax.device_put(padded(flat)))
        count = spec.num_hidden_layers
        return AdapterPages([_layer(there, np.int32(i), groups, count) for i in range(count)])

    return stage


@partial(jax.jit, static_argnums=(2, 3))
def _layer(
    flat: Shaped[Array, "pages N"], index: Int[Array, ""], groups: tuple[tuple[str, int, int, int], ...], count: int
) -> dict[str, LoraPages]:
    """The pages of one layer; compiled once for all layers."""
    size = flat.shape[1] // count
    columns, start, found = jax.lax.dynamic_slice_in_dim(flat, index * size, size, 1), 0, {}
    for group, ranks, features, out in groups:
        middle = start + ranks * features
        end = middle + RANK_PAGE * out
        a, b = columns[:, start:middle], columns[:, middle:end]
        found[group] = LoraPages(a.reshape(-1, ranks, features), b.reshape(-1, RANK_PAGE, out))
        start = end
    return found
