"""The store of compiled functions, on top of `jax.experimental.serialize_executable`.

Two kinds of files. NAME.executable is a program: NAME digests what XLA was given (the lowered module, its options) and
the environment. NAME.key says which program a function is: NAME digests what the function was made from (its key, our
source code, the environment). A second start finds the function by its key and loads the program, without tracing.
After a change of code that leaves the program as it was, tracing and lowering lead to it, without compiling.

jax's own compilation cache stays behind it: it holds the programs too, if the store cannot.

Loading is unpickling, and runs the machine code found: whoever can write the files can run anything as this user. That
is so for every cache of compiled code (jax's, Python's own __pycache__), and handled in the same way: the folder is in
the user's own cache folder and belongs to the user alone; files of other users, or writable by them, are not read. The
checksum is against damage, not against attackers.
"""

import functools
import hashlib
import logging
import os
import pickle
import re
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from loquetier_jax.executables.environment import code, default_device, environment
from loquetier_jax.executables.files import PrivateFolder

log = logging.getLogger(__name__)

Program = tuple[jax.stages.Lowered, dict[str, Any]]
"""A lowered function, and the options of XLA to compile it with."""

MAX_BYTES = 4 << 30  # about a hundred sets of a large model's functions
MAX_AGE_S = 30 * 24 * 3600.0

MAGIC = b"loquetier executable 1\n"


class DamagedError(Exception):
    """A file of the store is not what was written."""


class Executables:
    """Gives compiled functions: from disk if it can, else compiled, and then kept on disk.

    Thread-safe, and several processes may share a folder. Nothing on disk is ever an error: what cannot be read is
    compiled again, with one line in the log. Files unused for 30 days are removed, and the least recently used beyond
    4 GB; this happens once per process, before its first write.

    Args:
        folder: Where the files are; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._trimmed, self._lock = None, False, threading.Lock()
        if folder is None:
            return
        try:
            self._folder = PrivateFolder(folder)
        except OSError as error:
            log.warning("compiled functions are not kept on disk: %s", error)

    def get(self, key: Any, build: Callable[[], Program]) -> Callable[..., Any]:
        """The compiled function of `key`.

        Args:
            key: Its repr says everything that the function is made from, besides the environment and our code: the
                same in every process, different for different functions.
            build: Traces and lowers the function, best with `keep_unused`: functions of the same program then find it
                after a change of code, too. Called only if the function is not on disk.

        Returns:
            A `jax.stages.Compiled`. One from disk does what the compiled one did, to the bit: it donates the same
            arguments, and raises a TypeError for other shapes.

        Raises:
            ValueError: the repr of `key` contains an address, and it is to be kept.
        """
        if self._folder is None:
            lowered, options = build()
            return lowered.compile(options)
        if " at 0x" in repr(key):
            raise ValueError(f"key: got {key!r}, expected one whose repr is the same in every process")
        around, made_from = environment(default_device()), (code(), repr(key))
        alias = f"{_digest(around, *made_from)}.key"
        loaded = self._load(self._target(alias))
        if loaded is not None:
            return loaded
        lowered, options = build()
        text, trees = lowered.as_text(), str((lowered.args_info, lowered.in_tree, lowered.out_tree))
        # Which arguments XLA was not given is no part of the program; then it belongs to this function alone.
        owner = () if _takes_all_arguments(lowered, text) else made_from
        name = f"{_digest(around, text, trees, repr(options), *owner)}.executable"
        made = self._load(name)
        if made is None:
            made = self._compile(name, lowered, options)
        self._write(alias, name.encode())
        return made

    def _target(self, alias: str) -> str | None:
        content = self._read(alias)
        if content is None:
            return None
        name = content.decode("ascii", "replace")
        if re.fullmatch(r"[0-9a-f]{64}\.executable", name):
            return name
        self._report(alias, DamagedError("not the name of a program"))
        return None

    def _load(self, name: str | None) -> Callable[..., Any] | None:
        content = None if name is None else self._read(name)
        if content is None:
            return None
        try:
            parts = pickle.loads(unsealed(name, content))
            return serialize_executable.deserialize_and_load(*parts, execution_devices=[default_device()])
        except Exception as error:  # of pickle, jax or XLA, which have one for every kind of damage
            self._report(name, error)
            return None

    def _compile(self, name: str, lowered: jax.stages.Lowered, options: dict[str, Any]) -> Callable[..., Any]:
        compiled, fresh = compiled_afresh(lowered, options)
        if not fresh:
            compiled, fresh = compiled_afresh(lowered, options | _unheard_of())
        try:
            if not fresh:
                raise ValueError("jax does not say whether it compiled it")
            content = pickle.dumps(serialize_executable.serialize(compiled))
        except (ValueError, TypeError, NotImplementedError, pickle.PicklingError, jax.errors.JaxRuntimeError) as error:
            log.info("a compiled function cannot be kept on disk: %s", error)
        else:
            self._write(name, sealed(name, content))
        return compiled

    def _read(self, name: str) -> bytes | None:
        try:
            return self._folder.read(name)
        except OSError as error:
            self._report(name, error)
            return None

    def _report(self, name: str, error: Exception) -> None:
        """Says that a file is of no use, and removes it, so that it is said once."""
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        log.warning("%s: foreign or damaged, compiling again (%.200s)", self._folder.path / name, reason)
        self._folder.drop(name)

    def _write(self, name: str, content: bytes) -> None:
        try:
            with self._lock:
                if not self._trimmed:
                    self._folder.trim(MAX_BYTES, MAX_AGE_S)
                    self._trimmed = True
            self._folder.write(name, content)
        except OSError as error:
            log.warning("a compiled function cannot be kept on disk: %s", error)


NOWHERE = Executables(None)
"""Compiles, and keeps nothing."""


@functools.cache
def executables_in(folder: str | None) -> Executables:
    """The store of a compilation cache folder, one per process.

    Args:
        folder: As in `EngineConfig.compilation_cache_dir`: None is the user's cache folder, "" keeps nothing.
    """
    return NOWHERE if folder == "" else Executables(cache_folder(folder) / "executables")


def cache_folder(folder: str | None) -> Path:
    """Where compiled programs are kept: `folder`, or ~/.cache/loquetier_jax/xla if that is None."""
    return Path(folder) if folder else Path.home() / ".cache" / "loquetier_jax" / "xla"


def _takes_all_arguments(lowered: jax.stages.Lowered, text: str) -> bool:
    """Whether the lowered module has every argument of the function: those it does not use are left out."""
    head = next((line for line in text.splitlines() if "func.func public @main(" in line), "")
    return len(re.findall(r"%arg\d+: ", head)) == len(jax.tree.leaves(lowered.args_info))


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()


def sealed(name: str, content: bytes) -> bytes:
    """A program's file: `content` with its name and checksum before it."""
    return MAGIC + name.encode() + hashlib.sha256(content).digest() + content


def unsealed(name: str, file: bytes) -> bytes:
    """The content of a program's file.

    Raises:
        DamagedError: it is not the file that was written under this name.
    """
    head = MAGIC + name.encode()
    if not file.startswith(head):
        raise DamagedError("not the program of this name")
    checksum, content = file[len(head) : len(head) + 32], file[len(head) + 32 :]
    if hashlib.sha256(content).digest() != checksum:
        raise DamagedError("wrong checksum")
    return content


def compiled_afresh(lowered: jax.stages.Lowered, options: dict[str, Any]) -> tuple[jax.stages.Compiled, bool]:
    """The compiled function, and whether XLA has compiled it just now, in this thread.

    Else it comes from jax's compilation cache on disk, or from this process, which may have it from there. XLA cannot
    write again what it has read: on a CPU the copy is without its code, loads, and fails when it is called.
    """
    before = _seen.compiles, _seen.hits
    compiled = lowered.compile(options)
    return compiled, _seen.compiles > before[0] and _seen.hits == before[1]


def _unheard_of() -> dict[str, str]:
    """An option without effect that makes a program new to every cache: no pass of XLA has such a name."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    given = [flag.removeprefix(PASSES) for flag in flags if flag.startswith(PASSES)]
    return {PASSES.strip("-="): ",".join([*given[-1:], f"no-such-pass-{uuid.uuid4().hex}"])}


PASSES = "--xla_disable_hlo_passes="


class _Seen(threading.local):
    """What jax has told this thread: how often it got a program from XLA, and how often it was one from disk."""

    compiles = hits = 0


_seen = _Seen()


def _on_event(event: str, **_: Any) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _seen.hits += 1


def _on_duration(event: str, seconds: float, **_: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _seen.compiles += 1


jax.monitoring.register_event_listener(_on_event)
jax.monitoring.register_event_duration_secs_listener(_on_duration)
