"""LoRA adapters: configuration (PEFT's), exact-rank shape on a given base, and initial weights.

An exact-rank adapter, on the host or on a device, is a plain dict
`{"layers.{i}.{target}": {"lora_A": [r, in], "lora_B": [out, r]}}` in float32, PEFT's layout. Imports no jax.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from loquetier_jax.adapters.pattern import Steps, parse
from loquetier_jax.adapters.peft_arguments import PEFT_ARGUMENTS
from loquetier_jax.adapters.targets import (
    TARGETS,
    first_match,
    is_targeted,
    matches,
    module_name,
    pattern_matches,
    weight_key,
)
from loquetier_jax.borrowed import borrowing
from loquetier_jax.config import RANK_PAGE, require
from loquetier_jax.errors import AdapterError, NoModuleError, short
from loquetier_jax.models.spec import DecoderSpec

LoraWeights = dict[str, dict[str, Float[Any, "_ _"]]]
"""An exact-rank adapter, see the module docstring; arrays are numpy (host) or jax (device), f32."""

DEFAULT_TARGETS = ("q_proj", "v_proj")  # PEFT's for Llama, Mistral, Qwen and Gemma
_UNSUPPORTED_MODULES = ("lm_head", "model.embed_tokens")
_MATCH_STEPS = 2_000_000  # a few seconds; hundreds of patterns on hundreds of modules need about a sixth


@borrowing(PEFT_ARGUMENTS)
@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Settings of an adapter, with the names and semantics of PEFT's `LoraConfig`.

    PEFT's other arguments are accepted where they match what is done here (`bias="none"`, `task_type="CAUSAL_LM"`)
    and refused with an explanation otherwise.

    Attributes:
        r: Rank of every targeted module that `rank_pattern` does not name.
        lora_alpha: Scaling is lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`.
        target_modules: Names or suffixes of names, a regular expression for the whole name, or "all-linear";
            None is ("q_proj", "v_proj"). A list is stored as a sorted tuple.
        exclude_modules: Names, suffixes or a regular expression of modules to exclude.
        lora_dropout: Probability of dropping an element of the adapter's input in training.
        use_rslora: Rank-stabilised scaling.
        rank_pattern: {name, suffix or regular expression: rank}; the first match wins.
        alpha_pattern: The same for lora_alpha.
        init_lora_weights: True (A kaiming-uniform) or "gaussian" (A normal with standard deviation 1/r); B is zero.
        layers_to_transform: Restricts names that match by suffix to these layers; None means all layers.

    Raises:
        ConfigError: an invalid value.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    init_lora_weights: Literal[True, "gaussian"] = True
    layers_to_transform: tuple[int, ...] | None = None

    borrowed: ClassVar[frozenset[str]]

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        _check_rank("r", self.r)
        _check_alpha("lora_alpha", self.lora_alpha)
        for name, check in (("rank_pattern", _check_rank), ("alpha_pattern", _check_alpha)):
            pattern = getattr(self, name)
            require(isinstance(pattern, dict), name, pattern, "a mapping from module names to numbers")
            for key, value in pattern.items():
                _check_regex(name, key)
                check(f"{name}[{key!r}]", value)
            object.__setattr__(self, name, dict(pattern))
        dropout = self.lora_dropout
        require(_is_number(dropout) and 0 <= dropout < 1, "lora_dropout", dropout, "a number in [0, 1)")
        require(isinstance(self.use_rslora, bool), "use_rslora", self.use_rslora, "true or false")
        init = self.init_lora_weights
        require(init is True or init == "gaussian", "init_lora_weights", init, 'true or "gaussian"')
        layers = _layers(self.layers_to_transform)
        object.__setattr__(self, "layers_to_transform", layers)
        ok = layers is None or not isinstance(self.target_modules, str)
        require(ok, "layers_to_transform", layers, "null when target_modules is a string")


class LoraModule(NamedTuple):
    """One adapted projection with its rank and scaling (alpha / r, or alpha / sqrt(r) for rsLoRA)."""

    layer: int
    target: str
    r: int
    scaling: float


@dataclass(frozen=True)
class LoraShape:
    """The modules of an adapter with their ranks and scalings; hashable, hence static under jit.

    Attributes:
        modules: Sorted by layer, then by the order of `TARGETS`.
    """

    modules: tuple[LoraModule, ...]

    def __post_init__(self) -> None:
        modules = [LoraModule(*m) for m in self.modules]
        if not modules:
            raise AdapterError("modules: got none, expected at least one")
        for module in modules:
            if module.target not in TARGETS:
                known = ", ".join(TARGETS)
                raise AdapterError(f"modules: got target {module.target!r}, expected one of {known}")
        modules.sort(key=lambda m: (m.layer, TARGETS.index(m.target)))
        for one, other in pairwise(modules):
            if one[:2] == other[:2]:
                raise AdapterError(f"modules: {weight_key(one.layer, one.target)!r} is listed twice")
        object.__setattr__(self, "modules", tuple(modules))

    @cached_property
    def by_key(self) -> dict[str, LoraModule]:
        """{"layers.{i}.{target}": module}."""
        return {weight_key(m.layer, m.target): m for m in self.modules}

    @property
    def max_rank(self) -> int:
        return max(m.r for m in self.modules)

    @property
    def num_pages(self) -> int:
        """Pages of `RANK_PAGE` ranks: as many as the largest module needs; the others are zero-padded."""
        return -(-self.max_rank // RANK_PAGE)

    def array_shapes(self, spec: DecoderSpec) -> dict[str, dict[str, tuple[int, int]]]:
        """Shapes of the exact-rank arrays on the base `spec`, structured like `LoraWeights`."""
        sizes = spec.target_shapes
        return {
            key: {"lora_A": (m.r, sizes[m.target][0]), "lora_B": (sizes[m.target][1], m.r)}
            for key, m in self.by_key.items()
        }


def resolve_shape(config: LoraConfig, spec: DecoderSpec, *, strict: bool = True) -> LoraShape:
    """Applies the config's names and patterns to the modules of a base, by PEFT's rules.

    Args:
        config: Its names are matched against full HF names such as "model.layers.0.self_attn.q_proj".
        spec: The base.
        strict: Refuse any name, layer or pattern that matches no module. PEFT only requires that one of them
            matches, so folders are read with False.

    Raises:
        NoModuleError: no module matches.
        AdapterError: a name matches an unsupported module (embedding, head), `strict` is violated, or matching
            takes too long; the message names the culprit.
    """
    try:
        return LoraShape(tuple(_modules(config, spec, strict, Steps(_MATCH_STEPS))))
    except TimeoutError as error:
        raise AdapterError(f"target_modules or patterns: {error}; use fewer or simpler ones") from None


def _modules(config: LoraConfig, spec: DecoderSpec, strict: bool, steps: Steps) -> list[LoraModule]:
    names = {(i, t): module_name(i, t) for i in range(spec.num_hidden_layers) for t in TARGETS}
    for name in _UNSUPPORTED_MODULES:
        if config.target_modules != "all-linear" and _targeted(config, name, steps):
            raise AdapterError(f"target_modules: matches {name!r}; only {', '.join(TARGETS)} can be adapted")
    if strict:
        _refuse_idle_entries(config, list(names.values()), spec.num_hidden_layers, steps)
    modules = []
    for (layer, target), name in names.items():
        if _targeted(config, name, steps):
            r = first_match(config.rank_pattern, name, config.r, steps)
            alpha = first_match(config.alpha_pattern, name, config.lora_alpha, steps)
            modules.append(LoraModule(layer, target, r, alpha / (math.sqrt(r) if config.use_rslora else r)))
    if not modules:
        raise NoModuleError(
            f"target_modules: {short(config.target_modules, 500)} (exclude_modules "
            f"{short(config.exclude_modules, 200)}, layers {short(config.layers_to_transform, 200)}) "
            f"matches no module; names are like {module_name(0, 'q_proj')!r}"
        )
    return modules


def init_weights(shape: LoraShape, config: LoraConfig, spec: DecoderSpec, seed: int) -> LoraWeights:
    """Initial weights on the host, f32: a module's A depends only on (seed, layer, target, rank), B is zero.

    A is kaiming_uniform(a=sqrt(5)), that is U(-1/sqrt(in), 1/sqrt(in)), or normal of standard deviation 1/r
    for "gaussian" (PEFT, `LoraLayer.reset_lora_parameters`).

    Args:
        shape: What `resolve_shape(config, spec)` returned.
        config: Provides `init_lora_weights`.
        spec: The base.
        seed: An integer >= 0.
    """
    require(isinstance(seed, int) and seed >= 0, "seed", seed, "an integer >= 0")
    weights: LoraWeights = {}
    for key, sizes in shape.array_shapes(spec).items():
        module = shape.by_key[key]
        stream = np.random.Generator(np.random.Philox([seed, module.layer, TARGETS.index(module.target)]))
        r, features = sizes["lora_A"]
        if config.init_lora_weights == "gaussian":
            a = stream.standard_normal((r, features), np.float32) * np.float32(1 / r)
        else:
            a = (stream.random((r, features), np.float32) * 2 - 1) * np.float32(1 / math.sqrt(features))
        weights[key] = {"lora_A": a, "lora_B": np.zeros(sizes["lora_B"], np.float32)}
    return weights


def check_weights(weights: Mapping[str, Any], shape: LoraShape, spec: DecoderSpec) -> None:
    """Raises AdapterError unless `weights` has exactly the modules and array shapes of `shape` on the base."""
    expected = shape.array_shapes(spec)
    for key in sorted(weights.keys() | expected.keys()):
        if (key in weights) != (key in expected):
            raise AdapterError(f"weights: {key!r} is {'not in the shape' if key in weights else 'missing'}")
        if weights[key].keys() != {"lora_A", "lora_B"}:
            raise AdapterError(f"weights[{key!r}]: got {sorted(weights[key])}, expected lora_A and lora_B")
        for name, size in expected[key].items():
            if tuple(weights[key][name].shape) != size:
                got = tuple(weights[key][name].shape)
                raise AdapterError(f"weights[{key!r}][{name!r}]: got shape {got}, expected {size}")


def _targeted(config: LoraConfig, name: str, steps: Steps) -> bool:
    targets = DEFAULT_TARGETS if config.target_modules is None else config.target_modules
    return is_targeted(name, targets, config.exclude_modules, config.layers_to_transform, steps)


def _refuse_idle_entries(config: LoraConfig, names: list[str], num_layers: int, steps: Steps) -> None:
    for field_name in ("target_modules", "exclude_modules"):
        entries = getattr(config, field_name)
        for entry in () if entries is None or isinstance(entries, str) else entries:
            if not any(matches((entry,), name, steps) for name in names):
                known = ", ".join(TARGETS)
                raise AdapterError(f"{field_name}: {entry!r} matches no module; expected some of {known}")
    for field_name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field_name):
            if not any(pattern_matches(key, name, steps) for name in names):
                raise AdapterError(f"{field_name}: {key!r} matches no module")
    for layer in config.layers_to_transform or ():
        if layer >= num_layers:
            raise AdapterError(f"layers_to_transform: got {short(layer)}, expected layers 0 to {num_layers - 1}")


def _names(field_name: str, value: Any) -> tuple[str, ...] | str | None:
    if isinstance(value, str):
        _check_regex(field_name, value)
        return value
    if value is None:
        return None
    ok = isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(v, str) and v for v in value)
    require(ok, field_name, value, "a list of module names, a regular expression or null")
    return tuple(sorted(set(value)))


def _layers(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    layers = (value,) if isinstance(value, int) else value
    ok = isinstance(layers, (list, tuple)) and all(type(i) is int and i >= 0 for i in layers)
    require(ok, "layers_to_transform", value, "layer numbers >= 0 or null")
    return tuple(sorted(set(layers))) or None


def _check_rank(name: str, value: Any) -> None:
    require(type(value) is int and 1 <= value < 2**31, name, value, "an integer from 1 to 2**31 - 1")


def _check_alpha(name: str, value: Any) -> None:
    # Compared without conversion: a file may hold an integer too large for a float.
    require(_is_number(value) and 0 < value < 1e38, name, value, "a number > 0, below 1e38")


def _check_regex(name: str, value: Any) -> None:
    require(isinstance(value, str) and bool(value), name, value, "a module name or regular expression")
    try:
        parse(value)
    except ValueError as error:
        require(False, name, value[:200], f"a valid regular expression ({error})")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

