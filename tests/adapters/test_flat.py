"""The page form of an adapter, from memory and from a file, against `pages_of`, bit for bit."""

from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loquetier_jax.adapters.casts import page_casts
from loquetier_jax.adapters.flat import Layout, all_finite, flat_of, pieces_of, unflattened
from loquetier_jax.adapters.folder import Folders, read_folder
from loquetier_jax.adapters.lora import LoraModule, LoraShape
from loquetier_jax.adapters.pages import AdapterPages, pages_of, read_pages, write_pages
from loquetier_jax.adapters.peft import WEIGHTS_FILE, read_peft, write_peft
from loquetier_jax.adapters.staging import stager
from loquetier_jax.adapters.stored import cast_file
from loquetier_jax.adapters.version import Version
from loquetier_jax.errors import AdapterError
from tests.adapters.cases import MIXED, RANKS, SPEC, random_weights, uniform

SHAPES = [pytest.param(uniform(r), id=f"r{r}") for r in RANKS] + [pytest.param(MIXED, id="mixed")]
DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)
UNEVEN = LoraShape((*uniform(8).modules[:4], LoraModule(1, "v_proj", 8, 0.3), LoraModule(1, "up_proj", 24, 0.25)))


def bits(array: np.ndarray) -> np.ndarray:
    return array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_in_memory(shape: LoraShape, dtype: type) -> None:
    weights = random_weights(shape)
    flat = Layout(SPEC).cast(pieces_of(weights, shape), shape.num_pages, dtype)
    expected = pages_of(weights, shape, SPEC, dtype)
    np.testing.assert_array_equal(bits(flat), bits(flat_of(expected)))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), unflattened(flat, SPEC), expected)


@pytest.mark.parametrize("stored", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [uniform(8), MIXED, UNEVEN], ids=["r8", "mixed", "uneven"])
def test_a_folder_of_any_dtype(tmp_path: Path, shape: LoraShape, stored: type) -> None:
    weights = random_weights(shape)
    weights["layers.0.q_proj"]["lora_A"][0, :4] = np.nan, np.inf, 1e-42, 3e38
    write_peft(tmp_path / "a", weights, shape, SPEC)
    tensors = load_file(tmp_path / "a" / WEIGHTS_FILE)
    with np.errstate(all="ignore"):
        save_file({name: t.astype(stored) for name, t in tensors.items()}, tmp_path / "a" / WEIGHTS_FILE)
    found, expected = read_folder(tmp_path / "a", SPEC), read_peft(tmp_path / "a", SPEC)
    assert (found.config, found.shape) == (expected.config, expected.shape)
    for dtype in DTYPES:
        version = Version(id=1, name="a", shape=found.shape, source=found.folder, tensors=found.tensors)
        flat = page_casts(SPEC, np.dtype(dtype))["read"](version)
        with np.errstate(all="ignore"):
            pages = pages_of(expected.weights, shape, SPEC, dtype)
        np.testing.assert_array_equal(bits(flat), bits(flat_of(pages)))
        assert not all_finite(flat)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_found_wherever_it_is(dtype: type) -> None:
    flat = np.full((2, 700_000), -1.5, dtype)
    assert all_finite(flat)
    for at, value in (((0, 0), np.nan), ((1, 699_999), np.inf), ((1, 3), -np.inf)):
        flat[at] = value
        assert not all_finite(flat)
        flat[at] = 0


def test_a_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    write_peft(tmp_path / "a", random_weights(uniform(4)), uniform(4), SPEC)
    found, path = read_folder(tmp_path / "a", SPEC), tmp_path / "a" / WEIGHTS_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(AdapterError, match="has changed since it was loaded"):
        cast_file(path, found.tensors, found.shape, Layout(SPEC), np.dtype(np.float32))
    with pytest.raises(AdapterError, match=WEIGHTS_FILE):
        read_folder(tmp_path / "a", SPEC)
    path.unlink()
    with pytest.raises(AdapterError, match="cannot be read"):
        cast_file(path, found.tensors, found.shape, Layout(SPEC), np.dtype(np.float32))


def test_a_folder_of_many_names_is_checked_once_until_it_changes(tmp_path: Path) -> None:
    folders = Folders(SPEC, most=2)
    for name in "abc":
        write_peft(tmp_path / name, random_weights(uniform(4)), uniform(4), SPEC)
    a = folders.read(tmp_path / "a")
    assert folders.read(str(tmp_path / "a")) is a
    write_peft(tmp_path / "a", random_weights(uniform(8)), uniform(8), SPEC)
    again = folders.read(tmp_path / "a")
    assert again.shape == uniform(8) and again.fingerprint != a.fingerprint
    folders.read(tmp_path / "b"), folders.read(tmp_path / "c")
    assert folders.read(tmp_path / "a") is not again, "the oldest of three is forgotten"


@pytest.mark.parametrize("r", [8, 24, 40])
def test_staged_pages_are_written_as_they_are(r: int) -> None:
    weights, shape = random_weights(uniform(r)), uniform(r)
    staged = stager(SPEC)(Layout(SPEC).cast(pieces_of(weights, shape), shape.num_pages, np.float32))
    ids = (5, 2, 3)[: shape.num_pages]
    stacks = write_pages(AdapterPages.empty(SPEC, 6, np.float32), ids, staged)
    expected = pages_of(weights, shape, SPEC, np.float32)
    jax.tree.map(np.testing.assert_array_equal, read_pages(stacks, ids), expected)
    others = [i for i in range(6) if i not in ids]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(read_pages(stacks, others)))
