"""Explains a NaN by looking at the weights."""

import numpy as np

from loquetier_jax.adapters.store import AdapterStore
from loquetier_jax.adapters.version import Version


def why_nan(store: AdapterStore, version: Version | None) -> str:
    """An explanation of why a request's log-probability is NaN; looks at weights in memory, reads no folder.

    Args:
        store: The adapter store.
        version: The request's adapter version; None for the base.
    """
    if version is None:
        return "the base model gave NaN: its weights are not finite, or overflow on this prompt"
    if _is_finite(store, version):
        mine, theirs = f"the weights of adapter {version.name!r} are finite", "those of the base model are not"
        return f"the model gave NaN: {mine}; {theirs}, or something overflows on this prompt"
    return f"the model gave NaN: the weights of adapter {version.name!r} are not finite"


def _is_finite(store: AdapterStore, version: Version) -> bool:
    if version.finite is None:  # from a job: its pages have not been made on the host
        arrays = (a for pair in store.weights(version).values() for a in pair.values())
        version.finite = all(bool(np.isfinite(a).all()) for a in arrays)
    return version.finite
