"""Checkpoints: exact, refused when they do not fit, and never spoilt by a kill at any point of a save."""

import errno
import hashlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loquetier_jax.errors import CheckpointError, ConfigError
from loquetier_jax.train.checkpoint import (
    FAULT_POINTS,
    FORMAT,
    PREFIX,
    CheckpointStore,
    find_checkpoint,
    read_arrays,
    read_state,
)
from loquetier_jax.train.optimizer import init_state

ROOT = Path(__file__).parents[2]
STATE = {"losses": [0.1, 1 / 3, 5e-324], "cursor": {"step": 3, "pack": 1}}


def tree(value=0.0):
    weights = {
        "layers.0.q_proj": {
            "lora_A": np.full((2, 3), value, np.float32),
            "lora_B": np.ones((4, 2), np.float32),
        }
    }
    master, opt_state = init_state(weights, "adamw")
    grads = [{"qkv_proj": (jnp.full((1, 16, 3), 1e-40, jnp.float32), np.float32([np.nan, -0.0, np.inf]))}]
    return {"master": master, "opt_state": opt_state, "grads": grads}


def test_roundtrip_is_exact(tmp_path):
    arrays = tree(0.1)
    path = CheckpointStore(tmp_path / "made" / "here").save(arrays, STATE)
    assert find_checkpoint(tmp_path / "made" / "here") == find_checkpoint(path) == path
    assert read_state(path) == STATE
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, arrays))
    back = read_arrays(path, shapes)
    assert jax.tree.structure(back) == jax.tree.structure(arrays)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(arrays), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == np.asarray(b).tobytes()


def test_keeps_the_last_n(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    paths = [store.save({"x": np.float32([i])}, {"i": i}) for i in range(4)]
    assert store.committed() == paths[2:]
    assert sorted(p.name for p in tmp_path.iterdir()) == [p.name for p in paths[2:]]
    assert read_state(store.latest()) == {"i": 3}
    with pytest.raises(ConfigError, match="keep"):
        CheckpointStore(tmp_path, keep=0)


def test_what_does_not_fit_is_named(tmp_path):
    store = CheckpointStore(tmp_path)
    with pytest.raises(CheckpointError, match="no committed"):
        store.latest()
    with pytest.raises(CheckpointError, match="JSON"):
        store.save({"x": np.float32([1])}, {"loss": math.nan})
    assert not list(tmp_path.iterdir())
    path = store.save({"x": np.float32([1]), "y": np.int32(3)}, {})
    good = {"x": np.float32([0]), "y": np.int32(0)}
    assert read_arrays(path, good)["y"] == 3
    for bad, message in [
        (good | {"z": np.float32(0)}, "'z' is missing"),
        ({"x": good["x"]}, "'y' is unexpected"),
        (good | {"x": np.zeros(2, np.float32)}, r"'x': got float32\[1\], expected float32\[2\]"),
        (good | {"y": np.float32(0)}, r"'y': got int32\[\], expected float32\[\]"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            read_arrays(path, bad)


def test_what_another_version_wrote_is_refused(tmp_path):
    path = CheckpointStore(tmp_path).save({"x": np.float32([1])}, {})
    text = (path / "state.json").read_text().replace(f'"format": {FORMAT}', '"format": 99')
    (path / "state.json").write_text(text)
    marked = json.loads((path / "COMMITTED").read_text()) | {"state.json": hashlib.sha256(text.encode()).hexdigest()}
    (path / "COMMITTED").write_text(json.dumps(marked))
    with pytest.raises(CheckpointError, match="format 99"):
        read_state(path)
    (path / "COMMITTED").write_text(json.dumps(dict.fromkeys(marked, 5)))  # sizes, as in format 1
    with pytest.raises(CheckpointError, match="older version"):
        read_state(path)
    (path / "COMMITTED").unlink()
    with pytest.raises(CheckpointError, match="not a committed"):
        read_state(path)


def flip(file: Path) -> None:
    """One bit of the middle, as a bad disk turns it over."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "a bit": flip,
    "zeros": lambda f: f.write_bytes(bytes(f.stat().st_size)),
    "cut": lambda f: f.write_bytes(f.read_bytes()[:-1]),
    "grown": lambda f: f.write_bytes(f.read_bytes() + b" "),
    "other text": lambda f: f.write_text("[]"),
    "no text": lambda f: f.write_bytes(b"\xff" * f.stat().st_size),
    "gone": lambda f: f.unlink(),
    "a folder": lambda f: (f.unlink(), f.mkdir()),
}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three checkpoints of one job."""
    store = CheckpointStore(tmp_path_factory.mktemp("three"), keep=3)
    for i in range(3):
        store.save({"x": np.arange(64, dtype=np.float32) + i}, {"i": i})
    return store.folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_of_a_file_is_named_and_the_newest_good_one_offered(three, tmp_path, damage):
    last = sorted(three.iterdir())[-1]
    data = next((last / "arrays" / "d").iterdir())
    for file in (last / "COMMITTED", last / "state.json", last / "arrays" / "_METADATA", data):
        file = file.relative_to(three)
        folder = tmp_path / str(file).replace("/", "-")
        shutil.copytree(three, folder)
        good, newest = sorted(folder.iterdir())[-2:]
        DAMAGE[damage](folder / file)
        if file.name == "COMMITTED" and damage in ("gone", "a folder"):  # as if its save had not come to an end
            assert find_checkpoint(folder) == good
            continue
        if file.name == "COMMITTED" and damage == "grown":  # a space more is the same list
            assert read_state(newest) == {"i": 2}
            continue
        with pytest.raises(CheckpointError) as refused:
            read_state(find_checkpoint(folder))
        named = newest if file.name == "COMMITTED" else folder / file  # a digest in it may now fit another file no more
        assert str(named) in str(refused.value)
        assert f"newest intact one in its folder is {good}:" in str(refused.value)
        assert read_state(good) == {"i": 1}
        flip(good / "state.json")
        with pytest.raises(CheckpointError, match=rf"newest intact one in its folder is {folder / PREFIX}0*1:"):
            read_state(newest)


def test_a_checkpoint_without_a_good_one_beside_it(tmp_path):
    path = CheckpointStore(tmp_path).save({"x": np.float32([1])}, {})
    flip(path / "state.json")
    with pytest.raises(CheckpointError, match=r"state\.json: changed since it was written.*no intact one"):
        read_state(path)


KILLED = """
import os, sys
import numpy as np
from loquetier_jax.train.checkpoint import FAULT_POINTS, CheckpointStore

for point in FAULT_POINTS:  # one process for each, forked before anything starts a thread
    child = os.fork()
    if not child:
        folder = os.path.join(sys.argv[1], point)
        for i in range(3):
            CheckpointStore(folder, keep=2).save({"x": np.full(3, i, np.float32)}, {"i": i})
        kill = lambda here: os._exit(9) if here == point else None
        CheckpointStore(folder, keep=2, fault=kill).save({"x": np.full(3, 3, np.float32)}, {"i": 3})
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9, point
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder per fault point: three good saves, then one killed there by os._exit, each in a process."""
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("point", FAULT_POINTS)
def test_a_kill_leaves_a_good_checkpoint(killed, point):
    newest = 2 if point in FAULT_POINTS[:3] else 3
    store = CheckpointStore(killed / point, keep=2)
    for path, i in zip(store.committed()[-2:], (newest - 1, newest), strict=True):
        assert read_state(path) == {"i": i}
        assert np.array_equal(
            read_arrays(path, {"x": np.zeros(3, np.float32)})["x"], np.full(3, i, np.float32)
        )
    store.save({"x": np.full(3, 9, np.float32)}, {"i": 9})  # goes on, and clears what the kill left lying
    assert read_state(store.latest()) == {"i": 9}
    assert len(store.committed()) == len(list((killed / point).iterdir())) == 2


@pytest.mark.parametrize("point", [name for name in FAULT_POINTS if name not in ("after_commit", "after_prune")])
def test_a_save_that_fails_leaves_what_was_there(tmp_path, caplog, point):
    """Half a checkpoint stayed on the full disk; whatever old ones cannot be removed are no reason to fail."""

    def full(where):
        if where == point:
            raise OSError(errno.ENOSPC, "No space left on device")

    good = CheckpointStore(tmp_path, keep=1).save({"x": np.float32([1])}, {"i": 1})
    failing = CheckpointStore(tmp_path, keep=1, fault=full)
    if point.endswith("prune"):
        newest = failing.save({"x": np.float32([2])}, {"i": 2})
        assert "old checkpoints cannot be removed, the next save tries again: [Errno 28]" in caplog.text
    else:
        newest = good
        with pytest.raises(CheckpointError, match=r"checkpoint-00000002: cannot be written: \[Errno 28\] No space"):
            failing.save({"x": np.float32([2])}, {"i": 2})
        assert list(tmp_path.iterdir()) == [good]
    assert find_checkpoint(tmp_path) == newest and read_state(newest)["i"] in (1, 2)
    last = CheckpointStore(tmp_path, keep=1).save({"x": np.float32([3])}, {"i": 3})
    assert list(tmp_path.iterdir()) == [last]
