"""Merges an adapter into its base, tensor by tensor on the host, from the base's own files."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from jaxtyping import Float
from safetensors.numpy import save_file

from loquetier_jax.adapters.lora import LoraShape, LoraWeights, check_weights
from loquetier_jax.adapters.targets import module_name
from loquetier_jax.errors import AdapterError
from loquetier_jax.models.checkpoint import INDEX, Checkpoint
from loquetier_jax.models.load import open_hf

MAX_SHARD = 2 * 10**9
"""Maximum bytes of tensors per file, unless one tensor is larger; the host holds about twice as much at a time."""

_BESIDE = (".json", ".jinja", ".txt", ".model")  # config, tokenizer, chat template
_NOT_BESIDE = (".index.json", "adapter_config.json")  # weight index; an adapter, which transformers would load as well


def write_merged(
    folder: str | os.PathLike[str], base: str | os.PathLike[str], weights: LoraWeights, shape: LoraShape
) -> None:
    """Writes a HF model folder with every adapted W replaced by W + scaling * B A; the folder appears atomically.

    Sums are computed in float32 and rounded to the dtype of the base's tensor; other tensors, the config and the
    tokenizer are copied unchanged. The device is not used; the host holds one file of the new folder at a time.

    Args:
        folder: Created along with its parents; must be missing or empty.
        base: The base model's folder.
        weights: f32, numpy or jax arrays.
        shape: Ranks and scalings.

    Raises:
        AdapterError: the weights do not belong to `shape` or to the base, a merged weight is not finite in the base's
            dtype, or `folder` is not empty or cannot be created.
        ModelError: the base cannot be read.
    """
    folder, base = Path(folder), Path(base)
    try:
        taken = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    except OSError as error:
        raise _unusable(folder, error) from error
    if taken:
        raise AdapterError(f"folder: {folder} exists; expected a new or empty folder")
    spec, checkpoint = open_hf(base)
    check_weights(weights, shape, spec)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise _unusable(folder, error) from error
    try:
        for file in _beside(base):
            shutil.copyfile(file, temporary / file.name)
        _write_tensors(temporary, checkpoint, weights, shape)
        temporary.chmod(0o755)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unusable(folder: Path, error: OSError) -> AdapterError:
    return AdapterError(f"folder: {folder} cannot be created: {error.strerror or error}")


def _beside(base: Path) -> Iterator[Path]:
    """The files of a model folder to copy along with its weights."""
    for file in sorted(base.iterdir()):
        license_text = file.name.upper().startswith(("LICENSE", "NOTICE"))
        if file.is_file() and (license_text or file.name.endswith(_BESIDE)) and not file.name.endswith(_NOT_BESIDE):
            yield file


def _write_tensors(folder: Path, checkpoint: Checkpoint, weights: LoraWeights, shape: LoraShape) -> None:
    split = split_state_dict_into_shards_factory(
        checkpoint.entries,
        get_storage_size=lambda entry: entry.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=MAX_SHARD,
    )
    adapted = {f"{module_name(m.layer, m.target)}.weight": key for key, m in shape.by_key.items()}
    if strange := sorted(adapted.keys() - checkpoint.entries.keys()):
        raise AdapterError(f"weights: {strange[0]!r} is adapted, but {checkpoint.folder} has no tensor of that name")
    for file, names in split.filename_to_tensors.items():
        tensors = {name: checkpoint.read(name) for name in names}
        for name in adapted.keys() & tensors.keys():
            key = adapted[name]
            tensors[name] = _merged(name, tensors[name], weights[key], shape.by_key[key].scaling)
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _merged(
    name: str, weight: Float[np.ndarray, "out in"], pair: dict[str, Float[np.ndarray, "_ _"]], scaling: float
) -> Float[np.ndarray, "out in"]:
    a, b = (np.asarray(pair[part], np.float32) for part in ("lora_A", "lora_B"))
    with np.errstate(over="ignore", invalid="ignore"):  # checked below
        merged = (weight.astype(np.float32) + np.float32(scaling) * (b @ a)).astype(weight.dtype)
    if not np.isfinite(merged).all():
        raise AdapterError(f"{name}: not finite in {weight.dtype} after merging the adapter")
    return merged
