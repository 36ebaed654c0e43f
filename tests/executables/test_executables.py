"""The store of compiled functions: what it gives back, what it takes for another one, what it does about damage."""

import logging
import os
import pickle
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loquetier_jax.executables import NOWHERE, Executables, environment, executables_in, files, store
from pallas_kernels.common import cpu_bits

VECTOR = jax.ShapeDtypeStruct((64,), jnp.float32)
MATRIX = jax.ShapeDtypeStruct((64, 64), jnp.float32)


def step(w: jax.Array, kv: dict[str, jax.Array], unused: jax.Array, x: jax.Array) -> tuple[Any, jax.Array]:
    """As the engine's: a product of an argument that stays, arrays that are donated, one that is not needed."""
    return {"k": kv["k"] + x, "v": kv["v"] * 2}, jax.nn.softmax(w @ x)


def build(f: Callable[..., Any] = step, keep_unused: bool = True) -> tuple[jax.stages.Lowered, dict[str, str]]:
    jitted = jax.jit(f, donate_argnums=(1,), keep_unused=keep_unused)
    return jitted.lower(MATRIX, {"k": VECTOR, "v": VECTOR}, VECTOR, VECTOR), cpu_bits.compiler_options()


def arguments() -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    w, x, *kv = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((64, 64), 64, 64, 64))
    return w, dict(zip("kv", kv, strict=True)), x, x


def refuse() -> Any:
    raise AssertionError("traced again")


def compiles(executables: Executables, key: Any, f: Callable[..., Any] = step) -> bool:
    """Whether XLA is asked for the function, or the program is found."""
    asked = []
    made, options = build(f)

    class Seen:
        args_info, in_tree, out_tree, as_text = made.args_info, made.in_tree, made.out_tree, made.as_text

        def compile(self, options: dict[str, str]) -> Any:
            asked.append(options)
            return made.compile(options)

    executables.get(key, lambda: (Seen(), options))
    return bool(asked)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A folder with `step` under the key "step"."""
    folder = tmp_path / "executables"
    Executables(folder).get("step", build)
    return folder


def only(folder: Path, suffix: str) -> Path:
    (found,) = folder.glob(f"*{suffix}")
    return found


def test_a_loaded_function_does_what_the_compiled_one_did(kept: Path) -> None:
    first, second = NOWHERE.get("step", build), Executables(kept).get("step", refuse)
    given, again = arguments(), arguments()
    for one, other in zip(jax.tree.leaves(first(*given)), jax.tree.leaves(second(*again)), strict=True):
        np.testing.assert_array_equal(one, other)
        assert other.committed == one.committed and other.sharding == one.sharding
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(again[1])) and not again[0].is_deleted()
    second(again[0], {"k": np.zeros(64, np.float32), "v": np.zeros(64, np.float32)}, again[2], again[3])
    for wrong in (jnp.zeros(65), jnp.zeros(64, jnp.bfloat16)):
        with pytest.raises(TypeError):
            second(again[0], {"k": wrong, "v": wrong}, again[2], again[3])
    with pytest.raises(TypeError):
        second(again[0], again[3])


def test_files_are_private_and_no_part_stays(kept: Path) -> None:
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in kept.iterdir()} == {0o600}
    assert sorted(file.suffix for file in kept.iterdir()) == [".executable", ".key"]


def test_another_key_traces_and_finds_the_same_program(kept: Path) -> None:
    assert not compiles(Executables(kept), "another")
    assert compiles(Executables(kept), "third", lambda w, kv, u, x: step(w, kv, u, x + 1))
    assert len(list(kept.glob("*.executable"))) == 2 and len(list(kept.glob("*.key"))) == 3


def test_other_code_traces_anew(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "code", lambda: "other")
    with pytest.raises(AssertionError, match="traced again"):
        Executables(kept).get("step", refuse)
    assert not compiles(Executables(kept), "step")


def test_functions_that_differ_only_in_what_they_do_not_use(tmp_path: Path) -> None:
    """XLA is given the same program for both, because jit leaves out the argument that is not used."""

    def first(a: jax.Array, kv: Any, b: jax.Array, c: jax.Array) -> jax.Array:
        return b * 2

    def second(a: jax.Array, kv: Any, b: jax.Array, c: jax.Array) -> jax.Array:
        return c * 2

    texts = {build(f, keep_unused=False)[0].as_text().replace(f.__name__, "f") for f in (first, second)}
    assert len(texts) == 1
    second.__name__ = second.__qualname__ = first.__name__
    executables, zeros = Executables(tmp_path / "x"), np.zeros(64, np.float32)
    for f, expected in ((first, 2), (second, 6)):
        run = executables.get(f.__code__.co_firstlineno, lambda f=f: build(f, keep_unused=False))
        out = run(np.zeros((64, 64), np.float32), {"k": zeros, "v": zeros}, zeros + 1, zeros + 3)
        np.testing.assert_array_equal(out, np.full(64, expected, np.float32))


@pytest.mark.parametrize("suffix", [".executable", ".key"])
@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "writable"])
def test_damage_is_one_line_and_a_compile(
    kept: Path, suffix: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = only(kept, suffix)
    content = file.read_bytes()
    flipped = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    file.write_bytes({"empty": b"", "cut": content[:-5], "flipped": flipped, "writable": content}[damage])
    if damage == "writable":
        file.chmod(0o666)
    with caplog.at_level(logging.WARNING):
        run = Executables(kept).get("step", build)
    compiled = NOWHERE.get("step", build)
    assert jax.tree.all(jax.tree.map(np.array_equal, run(*arguments()), compiled(*arguments())))
    says = [record.getMessage() for record in caplog.records]
    assert len(says) == 1 and str(file) in says[0] and "compiling again" in says[0] and "\n" not in says[0]
    Executables(kept).get("step", refuse)


def test_a_program_under_the_name_of_another_is_not_run(kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = only(kept, ".executable")
    Executables(kept).get("other", lambda: build(lambda w, kv, u, x: step(w, kv, u, x + 1)))
    (other,) = set(kept.glob("*.executable")) - {own}
    own.write_bytes(other.read_bytes())
    with caplog.at_level(logging.WARNING):
        assert compiles(Executables(kept), "step")
    assert "not the program of this name" in caplog.records[0].getMessage()


def test_what_jax_refuses_to_load_is_compiled(kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The checksum is right: as after a change that the name does not show."""
    file = only(kept, ".executable")
    content = pickle.dumps((b"no executable", None, None))
    file.write_bytes(store.sealed(file.name, content))
    with caplog.at_level(logging.WARNING):
        assert compiles(Executables(kept), "step")
    assert len(caplog.records) == 1


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_that_others_may_write_is_not_used(kept: Path, mode: int, caplog: pytest.LogCaptureFixture) -> None:
    kept.chmod(mode)
    with caplog.at_level(logging.WARNING):
        executables = Executables(kept)
    assert compiles(executables, "step") and len(caplog.records) == 1
    assert "not kept on disk" in caplog.records[0].getMessage()


def test_what_cannot_be_written_is_said_and_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files.PrivateFolder, "write", full)
    with caplog.at_level(logging.WARNING):
        Executables(tmp_path / "x").get("step", build)(*arguments())
    assert "no space left" in caplog.records[0].getMessage()


@pytest.mark.parametrize("read", [True, False], ids=["by-the-store", "before"])
def test_a_program_from_jaxs_own_cache_is_kept_whole(tmp_path: Path, read: bool) -> None:
    """XLA on a CPU writes a program that it has read from there without its code; it would fail when it is called."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        NOWHERE.get("step", build)  # into jax's cache, if it was not there
        jax.clear_caches()
        if read:
            Executables(tmp_path / "x").get("step", build)
        else:
            NOWHERE.get("step", build)
            Executables(tmp_path / "x").get("step", build)
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
    jax.block_until_ready(Executables(tmp_path / "x").get("step", refuse)(*arguments()))


def test_threads_that_want_the_same(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: Executables(tmp_path / "x").get("step", build), range(4)))
    outs = [jax.tree.leaves(run(*arguments())) for run in made]
    assert all(np.array_equal(a, b) for out in outs for a, b in zip(out, outs[0], strict=True))
    assert len(list((tmp_path / "x").iterdir())) == 2
    Executables(tmp_path / "x").get("step", refuse)


def test_a_key_that_another_process_would_not_find_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the same in every process"):
        Executables(tmp_path / "x").get(("loss", refuse), build)


def test_what_was_not_used_for_long_goes_first(tmp_path: Path) -> None:
    folder, now = files.PrivateFolder(tmp_path / "x"), time.time()
    made = (("new", 10, 1), ("used", 10, 50), ("large", 100, 60), ("old", 10, 9000), ("a.part", 1, 4000))
    for name, size, age in made:
        folder.write(name, bytes(size))
        os.utime(folder.path / name, (now - age, now - age))
    assert folder.read("used") == bytes(10) and folder.read("none") is None
    folder.trim(max_bytes=50, max_age_s=5000.0)
    assert {file.name for file in folder.path.iterdir()} == {"new", "used"}


def test_the_environment_has_what_changes_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    device = environment.default_device()
    plain = environment.environment(device)
    assert environment.environment(device) == plain
    with jax.default_matmul_precision("bfloat16"):
        assert environment.environment(device) != plain
    with jax.log_compiles(), jax.transfer_guard("log"):
        assert environment.environment(device) == plain
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    assert environment.environment(device) != plain
    assert any(name.startswith("jaxlib-") for name in environment.installed())
    assert environment.host("cpu") != environment.host("gpu")


def test_folders_by_configuration(tmp_path: Path) -> None:
    assert executables_in("") is NOWHERE
    assert executables_in(str(tmp_path)) is executables_in(str(tmp_path))
    assert (tmp_path / "executables").is_dir()
