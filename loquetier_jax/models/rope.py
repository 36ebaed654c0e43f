"""Rotary position embedding: its configuration and frequencies. Imports no jax."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from loquetier_jax.errors import ModelError

DEFAULT_THETA = 10_000.0  # transformers' default rope_theta

_COMMON_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor")
_LENGTH_KEY = "original_max_position_embeddings"


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's scaling of long wavelengths.

    Attributes:
        factor: Wavelengths above `original_max_position_embeddings / low_freq_factor` are multiplied by this.
        low_freq_factor: Sets the wavelength above which the full factor applies.
        high_freq_factor: Sets the wavelength below which nothing changes; in between, frequencies are interpolated.
        original_max_position_embeddings: Context length in pretraining, tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


def read_rope(config: Mapping[str, Any], max_position_embeddings: int) -> tuple[float, Llama3Rope | None]:
    """Reads `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (Hub files).

    Args:
        config: The parsed `config.json`.
        max_position_embeddings: Default for `original_max_position_embeddings`.

    Returns:
        (rope_theta, rope_scaling).

    Raises:
        ModelError: a rope type that is not default or llama3, an unknown key, a missing or invalid number.
    """
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(name) or {}
    if not isinstance(rope, Mapping):
        raise ModelError(f"{name}: got {rope!r}, expected a mapping")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise ModelError(f"{name}: got one rope per layer type ({sorted(rope)}), expected one for all layers")
    if kind not in ("default", "llama3"):
        raise ModelError(f"{name}: rope_type {kind!r} is not supported, expected 'default' or 'llama3'")
    unknown = set(rope) - _COMMON_KEYS - {*_LLAMA3_KEYS, _LENGTH_KEY}
    if unknown:
        raise ModelError(f"{name}: keys {sorted(unknown)} are not supported")
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise ModelError(f"partial_rotary_factor: {partial!r} is not supported, expected 1.0")
    theta = rope.get("rope_theta")
    theta = _positive("rope_theta", config.get("rope_theta", DEFAULT_THETA) if theta is None else theta)
    if kind == "default":
        return theta, None
    return theta, _read_llama3(name, rope, config, max_position_embeddings)


def _read_llama3(
    name: str, rope: Mapping[str, Any], config: Mapping[str, Any], max_position_embeddings: int
) -> Llama3Rope:
    # transformers gives the top-level key priority (modeling_rope_utils.standardize_rope_params).
    original = config.get(_LENGTH_KEY) or rope.get(_LENGTH_KEY, max_position_embeddings)
    factor, low, high = (_positive(f"{name}.{key}", rope.get(key)) for key in _LLAMA3_KEYS)
    if high <= low:
        raise ModelError(f"{name}.high_freq_factor: got {high}, expected more than low_freq_factor {low}")
    return Llama3Rope(factor, low, high, int(_positive(f"{name}.{_LENGTH_KEY}", original)))


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e38:  # of f32
        raise ModelError(f"{name}: got {value!r}, expected a positive number")
    return float(value)


def inverse_frequencies(
    head_dim: int, theta: float, scaling: Llama3Rope | None
) -> Float[np.ndarray, " half"]:
    """Radians per position of each rotated pair: f32 [head_dim / 2].

    theta^(-2i / head_dim), with Llama 3.1's scaling as in transformers' `_compute_llama3_parameters`: in f32 and in
    the same order of operations, because positions up to 10^5 amplify any difference.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = (np.float32(1.0) / np.float32(theta) ** exponent).astype(np.float32)
    if scaling is None:
        return plain
    low, high, factor = scaling.low_freq_factor, scaling.high_freq_factor, scaling.factor
    length = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / plain
    smooth = (length / wavelength - low) / (high - low)
    between = (1 - smooth) * plain / factor + smooth * plain
    scaled = np.where(wavelength > length / low, plain / factor, between)
    return np.where(wavelength < length / high, plain, scaled).astype(np.float32)
