"""Whose fault a NaN is, as far as weights can tell."""

import numpy as np

from loquetier_jax.adapters.store import AdapterStore
from loquetier_jax.adapters.version import Version
from loquetier_jax.errors import AdapterError


def why_nan(store: AdapterStore, version: Version | None) -> str:
    """Why a request's log-probability is NaN; reads the weights of its adapter.

    Args:
        store: Where they are.
        version: Its adapter's; None for the base.
    """
    if version is None:
        return "the base model gave NaN: its weights are not finite, or overflow on this prompt"
    try:
        arrays = [a for pair in store.weights(version).values() for a in pair.values()]
    except AdapterError as error:  # its folder has changed since; the device has what it was
        return f"the model gave NaN under adapter {version.name!r}, whose weights cannot be checked: {error}"
    if all(bool(np.isfinite(a).all()) for a in arrays):
        mine, theirs = f"the weights of adapter {version.name!r} are finite", "those of the base model are not"
        return f"the model gave NaN: {mine}; {theirs}, or something overflows on this prompt"
    return f"the model gave NaN: the weights of adapter {version.name!r} are not finite"
