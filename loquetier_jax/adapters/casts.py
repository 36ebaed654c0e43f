"""How weights in memory and in folders become an engine's flat pages."""

from collections.abc import Callable

import numpy as np

from loquetier_jax.adapters.flat import FlatPages, Layout, pieces_of
from loquetier_jax.adapters.lora import LoraShape, LoraWeights
from loquetier_jax.adapters.peft import WEIGHTS_FILE
from loquetier_jax.adapters.stored import cast_file
from loquetier_jax.adapters.version import Version
from loquetier_jax.models.spec import DecoderSpec


def page_casts(spec: DecoderSpec, dtype: np.dtype) -> dict[str, Callable[..., FlatPages]]:
    """`cast` and `read` of `residency.PageTransfers`, for adapters on the base `spec` in a compute dtype."""
    layout = Layout(spec)

    def cast(weights: LoraWeights, shape: LoraShape) -> FlatPages:
        return layout.cast(pieces_of(weights, shape), shape.num_pages, dtype)

    def read(version: Version) -> FlatPages:
        return cast_file(version.source / WEIGHTS_FILE, version.tensors, version.shape, layout, dtype)

    return {"cast": cast, "read": read}
