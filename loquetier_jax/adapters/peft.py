"""Reads and writes PEFT LoRA folders (adapter_config.json, adapter_model.safetensors); drops nothing silently."""

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from loquetier_jax.adapters.lora import LoraConfig, LoraShape, LoraWeights, check_weights, resolve_shape
from loquetier_jax.adapters.peft_config import config_from_peft, config_to_peft
from loquetier_jax.adapters.stored import DTYPES, Entry, StoredTensor, read_header
from loquetier_jax.adapters.targets import TARGETS, module_name, unwrapped, weight_key
from loquetier_jax.errors import AdapterError, NoModuleError
from loquetier_jax.models.spec import DecoderSpec

log = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# Models not saved by PEFT's own save_pretrained may lack the prefix or repeat it, and have the name of the adapter
# ("default") after lora_A.
_TENSOR = re.compile(r"(?:base_model\.model\.)*(.+)\.(lora_[AB])(?:\.[^.]+)?\.weight")
_WHOLE = (
    "a full embedding or output head, which PEFT saves along with LoRA after a vocabulary resize, is not supported; "
    "merge the adapter into its base (PEFT: merge_and_unload) and load the result as a model"
)
_FOREIGN = {
    "lora_magnitude_vector": "DoRA is not supported",
    "lora_embedding_": "embeddings cannot be adapted",
    "lora_B.bias": "lora_bias is not supported",
    "trainable_tokens": "trainable_token_indices is not supported",
    "base_layer": "trained biases and base weights are not supported",
    "lm_head.lora_": "the output head cannot be adapted",
    "lm_head.": _WHOLE,
    "embed_tokens.": _WHOLE,
}


class PeftAdapter(NamedTuple):
    """The contents of a PEFT folder.

    Attributes:
        config: The LoRA settings; any initialisation other than "gaussian" reads as True.
        shape: The modules with ranks and scalings.
        weights: numpy, f32.
    """

    config: LoraConfig
    shape: LoraShape
    weights: LoraWeights


class InspectedAdapter(NamedTuple):
    """What the config and the header of a PEFT folder say.

    Attributes:
        config, shape: As in PeftAdapter.
        tensors: Where its tensors are in the weights file.
    """

    config: LoraConfig
    shape: LoraShape
    tensors: tuple[StoredTensor, ...]


def read_peft(folder: str | os.PathLike[str], spec: DecoderSpec) -> PeftAdapter:
    """Reads an adapter saved by PEFT for the base `spec`.

    Every key of the config and every tensor is accounted for: the tensors must be exactly those implied by the
    config's targets and patterns, in PEFT's shapes. float64, float16 and bfloat16 become float32. Name components added
    by wrappers such as torch.compile and DDP are stripped. If target_modules is a regular expression that matches no
    module of this base (because it was written for a wrapper or a larger model), the modules are taken from the tensors
    in the file, with a warning.

    Raises:
        AdapterError: a missing or unreadable file, or an unsupported key or tensor; the message names it.
    """
    found = inspect_peft(folder, spec)
    return PeftAdapter(found.config, found.shape, read_weights(folder, found.shape, spec))


def inspect_peft(folder: str | os.PathLike[str], spec: DecoderSpec) -> "InspectedAdapter":
    """Checks all that `read_peft` checks, from the config and the header and size of the weights: reads no tensor.

    Raises:
        AdapterError: what `read_peft` refuses.
    """
    folder = Path(folder)
    path = _existing(folder, CONFIG_FILE)
    _existing(folder, WEIGHTS_FILE)
    try:
        config = config_from_peft(json.loads(path.read_text(encoding="utf-8-sig")))
        config, shape = _resolve(config, spec, folder / WEIGHTS_FILE)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: not JSON: {error}") from error
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error}") from error
    with _telling(folder / WEIGHTS_FILE), safe_open(folder / WEIGHTS_FILE, "numpy"):  # it checks size and offsets
        held = read_header(folder / WEIGHTS_FILE)
        places = _checked_tensors(held, shape, spec)
    tensors = (StoredTensor(*at, held[name].dtype, held[name].start) for name, at in places.items())
    return InspectedAdapter(config, shape, tuple(tensors))


def _resolve(config: LoraConfig, spec: DecoderSpec, path: Path) -> tuple[LoraConfig, LoraShape]:
    """(config with targets that match, the shape it describes)."""
    try:
        return config, resolve_shape(config, spec, strict=False)
    except NoModuleError:
        held = sorted(_held_modules(path, spec)) if isinstance(config.target_modules, str) else []
        if not held:
            raise
        log.warning("%s: target_modules matches no module of this base; using the %d in the file", path, len(held))
        config = replace(config, target_modules=tuple(held))
        return config, resolve_shape(config, spec, strict=False)


def _held_modules(path: Path, spec: DecoderSpec) -> set[str]:
    """Full names of the base's modules that have tensors in the file; empty if it cannot be read."""
    known = {module_name(i, t) for i in range(spec.num_hidden_layers) for t in TARGETS}
    try:
        with safe_open(path, "numpy") as file:
            found = [_TENSOR.fullmatch(unwrapped(tensor)) for tensor in file.keys()]  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError):
        return set()
    return {match[1] for match in found if match} & known


def read_weights(folder: str | os.PathLike[str], shape: LoraShape, spec: DecoderSpec) -> LoraWeights:
    """Reads only the weights of a folder whose shape is known.

    Raises:
        AdapterError: the file is missing or unreadable, or does not match `shape` exactly; names the tensor.
    """
    path = _existing(Path(folder), WEIGHTS_FILE)
    weights: LoraWeights = {}
    with _telling(path), safe_open(path, "numpy") as file:
        for tensor, (key, name) in _checked_tensors(read_header(path), shape, spec).items():
            with np.errstate(all="ignore"):  # NaN and infinity are kept; they affect only this adapter's rows
                weights.setdefault(key, {})[name] = file.get_tensor(tensor).astype(np.float32)
    return weights


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    """Names the file in errors."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: cannot be read: {error}") from error


def fingerprint(folder: str | os.PathLike[str]) -> tuple[tuple[int, int], ...]:
    """(bytes, modification time in ns) of the folder's two files; changes when they are rewritten.

    Raises:
        AdapterError: a file is missing.
    """
    stats = [_existing(Path(folder), name).stat() for name in (CONFIG_FILE, WEIGHTS_FILE)]
    return tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)


def write_peft(
    folder: str | os.PathLike[str],
    weights: LoraWeights,
    shape: LoraShape,
    spec: DecoderSpec,
    *,
    config: LoraConfig | None = None,
    base_model_name_or_path: str | None = None,
) -> None:
    """Writes a folder from which PEFT loads the same deltas; the folder appears atomically.

    Args:
        folder: Created along with its parents; replaced if it holds only an adapter.
        weights: f32, numpy or jax arrays.
        shape: Ranks and scalings; `rank_pattern` and `alpha_pattern` are written where they vary.
        spec: The base, for names and sizes.
        config: Provides lora_dropout and init_lora_weights; ranks, scalings and targets come from `shape`.
        base_model_name_or_path: Written as given.

    Raises:
        AdapterError: the weights do not belong to `shape`, or `folder` holds something else.
    """
    check_weights(weights, shape, spec)
    folder = Path(folder)
    _check_replaceable(folder)
    # safetensors writes the raw buffer, so a transposed view would be saved untransposed.
    tensors = {
        _tensor_name(key, name, shape): np.ascontiguousarray(weights[key][name], np.float32)
        for key in shape.by_key
        for name in ("lora_A", "lora_B")
    }
    fields = config_to_peft(shape, spec, config or LoraConfig(), base_model_name_or_path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        text = json.dumps(fields, indent=2, sort_keys=True)
        (temporary / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        temporary.chmod(0o755)
        _replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_replaceable(folder: Path) -> None:
    if folder.exists():
        found = {p.name for p in folder.iterdir()} if folder.is_dir() else {"no folder"}
        if found - {CONFIG_FILE, WEIGHTS_FILE}:
            raise AdapterError(f"folder: {folder} is or contains {sorted(found)}, expected only an adapter")


def _replace(new: Path, folder: Path) -> None:
    # rename() cannot replace a non-empty folder: move the old one aside, and back on failure.
    aside = new.with_name(new.name + ".old")
    if folder.exists():
        folder.rename(aside)
    try:
        new.rename(folder)
    except OSError:
        if aside.exists():
            aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _existing(folder: Path, name: str) -> Path:
    path = folder / name
    if path.is_file():
        return path
    if name == WEIGHTS_FILE and (folder / "adapter_model.bin").exists():
        raise AdapterError(
            f"{folder}: adapter_model.bin is a pickle, which is not supported; convert it to {WEIGHTS_FILE} "
            "(load it with PEFT and call save_pretrained)"
        )
    raise AdapterError(f"{path}: no such file; expected a PEFT folder with {CONFIG_FILE} and {WEIGHTS_FILE}")


def _tensor_name(key: str, name: str, shape: LoraShape) -> str:
    module = shape.by_key[key]
    return f"base_model.model.{module_name(module.layer, module.target)}.{name}.weight"


def _checked_tensors(held: dict[str, Entry], shape: LoraShape, spec: DecoderSpec) -> dict[str, tuple[str, str]]:
    """What `_located` finds in a file, after a check of dtypes and shapes: every array of `shape` is there."""
    sizes = shape.array_shapes(spec)
    found = _located(sorted(held), shape, spec)
    for tensor, (key, name) in found.items():
        if held[tensor].dtype not in DTYPES:
            raise AdapterError(f"tensor {tensor!r}: got {held[tensor].dtype}, expected one of {tuple(DTYPES)}")
        if held[tensor].shape != sizes[key][name]:
            expected = sizes[key][name]
            raise AdapterError(f"tensor {tensor!r}: got shape {held[tensor].shape}, expected {expected}")
    there = set(found.values())
    missing = [_tensor_name(k, n, shape) for k in sizes for n in sizes[k] if (k, n) not in there]
    if missing:
        raise AdapterError(f"missing tensor {missing[0]!r} of a target module ({len(missing)} in all)")
    return found


def _located(tensors: list[str], shape: LoraShape, spec: DecoderSpec) -> dict[str, tuple[str, str]]:
    """Tensor -> (key, "lora_A" or "lora_B"), its place in `LoraWeights`."""
    keys = {module_name(i, t): weight_key(i, t) for i in range(spec.num_hidden_layers) for t in TARGETS}
    found: dict[tuple[str, str], str] = {}
    for tensor in tensors:
        match = _TENSOR.fullmatch(unwrapped(tensor))
        key = keys.get(match[1]) if match else None
        if key is None:
            why = next((text for part, text in _FOREIGN.items() if part in tensor), "no such module")
            raise AdapterError(f"unknown tensor {tensor!r}: {why}")
        if key not in shape.by_key:
            raise AdapterError(f"unknown tensor {tensor!r}: its module is not among the target_modules")
        other = found.setdefault((key, match[2]), tensor)
        if other != tensor:
            raise AdapterError(f"tensors {other!r} and {tensor!r}: expected one {match[2]} per module")
    return {tensor: place for place, tensor in found.items()}
